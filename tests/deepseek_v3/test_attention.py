"""Latent attention against its definition, head by head and position by position."""

import pytest
import torch
import torch.nn.functional as F

from lightning_dualpipe.deepseek_v3.attention import Attention
from lightning_dualpipe.deepseek_v3.causal_attention import causal_attention
from lightning_dualpipe.deepseek_v3.rope import Rotary
from tests.deepseek_v3.small import randomize, small_config, weights_of
from tests.oracles import deepseek_v3 as oracle

CASES = {
    "small": {},
    "queries_not_compressed": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "biases_but_not_of_plain_queries": {"attention_bias": True, "q_lora_rank": None},
    "halves_not_neighbours": {"rope_interleave": False},
    "wide_values": {"v_head_dim": 17},
    "no_yarn": {"rope_scaling": None},
    "one_head": {"num_attention_heads": 1},
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_attention_and_its_gradients_are_those_of_the_definition(overrides):
    config = small_config(**overrides)
    attention = randomize(Attention(config, Rotary(config)))
    weights = weights_of(attention)
    x = torch.randn(2, 7, config.hidden_size, dtype=torch.float64, requires_grad=True)

    y = attention(x)
    want = torch.stack([oracle.mla(config, weights, sequence) for sequence in x])

    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    parameters = dict(attention.named_parameters())
    got_grads = torch.autograd.grad(y, [x, *parameters.values()], g)
    want_grads = torch.autograd.grad(want, [x, *(weights[name] for name in parameters)], g)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-11, atol=1e-11)


def test_biases_are_where_the_released_format_has_them():
    config = small_config(attention_bias=True)
    biased = {name for name, _ in Attention(config, Rotary(config)).named_parameters() if name.endswith("bias")}
    assert biased == {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}

    config = small_config(attention_bias=True, q_lora_rank=None)
    biased = {name for name, _ in Attention(config, Rotary(config)).named_parameters() if name.endswith("bias")}
    assert biased == {"kv_a_proj_with_mqa.bias", "o_proj.bias"}


def plain_attention(q, k, v, scale):
    scores = torch.einsum("bthc,bshc->bhts", q, k) * scale
    scores = scores.masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_blocks_of_rows_give_what_the_whole_matrix_does(length):
    """Blocks have 64 rows; the many heads of the longer ones are more than one group."""
    q, k = torch.randn(2, 2, length, 17, 6, dtype=torch.float64)
    v = torch.randn(2, length, 17, 9, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    g = torch.randn_like(v)

    got, want = causal_attention(q, k, v, 0.3), plain_attention(q, k, v, 0.3)

    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    got_grads, want_grads = (torch.autograd.grad(y, leaves, g) for y in (got, want))
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-12, atol=1e-12)


def test_a_sequence_does_not_depend_on_its_neighbours_in_the_batch():
    """Bit for bit: microbatches of any size then give the same numbers."""
    q, k, v = torch.randn(3, 4, 130, 5, 8)
    whole = causal_attention(q, k, v, 0.3)

    assert torch.equal(
        torch.cat([causal_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], 0.3) for b in range(4)]), whole
    )


def test_half_types_are_computed_in_float32():
    q, k, v = torch.randn(3, 1, 70, 2, 8).bfloat16()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = causal_attention(q, k, v, 0.3)
    g = torch.randn_like(y)

    wide = [x.detach().float().requires_grad_() for x in leaves]
    want = causal_attention(*wide, 0.3)
    assert torch.equal(y, want.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(causal_attention(q, k, v, 0.3), y)
    for got, exact in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, wide, g.float()), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, exact.bfloat16(), rtol=2**-7, atol=1e-6)


def test_it_agrees_with_the_fused_kernels_of_torch():
    q, k, v = torch.randn(3, 2, 100, 3, 16)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.2).transpose(1, 2)

    torch.testing.assert_close(causal_attention(q, k, v, 0.2), want)
