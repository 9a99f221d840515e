"""Tokens rounded to FP8 on their way to experts: the layer against a loop over tokens, and beside FP8 products."""

import pytest
import torch

from lightning_dualpipe.deepseek_v3.block import MoEBlock
from lightning_dualpipe.deepseek_v3.moe import MoE
from lightning_dualpipe.deepseek_v3.rope import Rotary
from lightning_dualpipe.parallel.dispatch import LocalDispatcher
from lightning_dualpipe.precision.convert import convert
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.fp8_rows import round_expert_tokens
from lightning_dualpipe.precision.recipe import Block
from lightning_dualpipe.precision.reference import round_to_grid
from tests.deepseek_v3.small import randomize, small_config
from tests.oracles import deepseek_v3 as oracle

HOW = Block().activation


class Rounded(torch.autograd.Function):
    """Straight through; and its mirror image."""

    @staticmethod
    def forward(ctx, x):
        return round_to_grid(x, HOW)

    @staticmethod
    def backward(ctx, grad):
        return grad


class GradientRounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return round_to_grid(grad, HOW)


def mixture(moe, x_BTD):
    """The definition: each token to each of its experts by itself; the router and shared experts see it unrounded."""
    weights_NK, experts_NK, balance_B = moe.gate(x_BTD)
    rows = []
    for x_D, weights_K, experts_K in zip(x_BTD.flatten(0, 1), weights_NK, experts_NK, strict=True):
        rounded_D, sum_D = Rounded.apply(x_D[None])[0], 0
        for weight, expert in zip(weights_K, experts_K.tolist(), strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ rounded_D).chunk(2)
            sum_D = sum_D + moe.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up * weight)
        rows.append(GradientRounded.apply(sum_D[None])[0])
    return torch.stack(rows).view_as(x_BTD) + moe.shared_experts(x_BTD), balance_B


def run(function, parameters, *, width=24, dtype=torch.float64, first=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, width, generator=generator, dtype=torch.float64).to(dtype)
    x[..., 0] *= first
    x.requires_grad_()
    y, balance = function(x)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad((y * g).sum() + balance.sum(), [x, *parameters.values()])
    return y.detach(), grads[0], dict(zip(parameters, grads[1:], strict=True))


@pytest.mark.parametrize("width", [24, 150])
def test_a_mixture_and_its_gradients_are_those_of_a_loop_over_tokens(width):
    moe = randomize(MoE(small_config(hidden_size=width)))
    parameters = dict(moe.named_parameters())
    plain, _, _ = run(moe, parameters, width=width)
    assert round_expert_tokens(moe, Block()) == [""]

    got, want = (run(f, parameters, width=width) for f in (moe, lambda x: mixture(moe, x)))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (got[0] - plain).abs().max() > 1e-3, "tokens were rounded"
    round_expert_tokens(moe, None)
    assert torch.equal(run(moe, parameters, width=width)[0], plain)


def test_the_oracle_without_rounding_is_the_mixture_of_the_report(monkeypatch):
    """So that the loop above is the same layer but for that."""
    moe = randomize(MoE(small_config()))
    monkeypatch.setattr(Rounded, "apply", lambda x: x)
    monkeypatch.setattr(GradientRounded, "apply", lambda x: x)
    x = torch.randn(9, 24, dtype=torch.float64)
    want, _ = oracle.mixture(small_config(), dict(moe.state_dict()), x)
    torch.testing.assert_close(mixture(moe, x[None])[0][0], want, rtol=1e-12, atol=1e-12)


def test_a_block_in_phases_rounds_what_the_mixture_rounds():
    config = small_config()
    block = randomize(MoEBlock(config, Rotary(config)))
    assert round_expert_tokens(block, Block()) == ["mlp"]
    norm, attention = block.post_attention_layernorm, block._attended

    def whole(h):
        h = attention(h)
        y, balance = block.mlp(norm(h))
        return h + y, balance

    parameters = dict(block.named_parameters())
    got, want = (run(f, parameters) for f in (lambda h: block(h, h.new_zeros(2)), whole))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    round_expert_tokens(block, None)
    assert (run(whole, parameters)[0] - got[0]).abs().max() > 1e-3


@pytest.mark.parametrize("first", [1.0, 2.0**-16], ids=["even", "one value far below the others"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_experts_that_multiply_in_fp8_find_nothing_left_to_round(dtype, first):
    """Their products round the same tiles of a token: outputs and gradients of tokens keep their bits.

    Gradients of weights round other tiles, along the tokens. Under scales that are powers of two a value keeps its
    four significant bits in any tile, unless it is less than 2^-14 of the largest one beside it.
    """
    moe = randomize(MoE(small_config(hidden_size=150))).to(dtype)
    assert convert(moe, EmulateBackend(Block()), lambda name, _: name == "experts") == ["experts"]
    parameters = dict(moe.named_parameters())
    as_they_are = run(moe, parameters, width=150, dtype=dtype, first=first)
    round_expert_tokens(moe, Block())
    rounded = run(moe, parameters, width=150, dtype=dtype, first=first)
    assert torch.equal(rounded[0], as_they_are[0]) and torch.equal(rounded[1], as_they_are[1])
    for name, gradient in as_they_are[2].items():
        changed = first != 1 and name == "experts.gate_up_proj"
        assert torch.equal(rounded[2][name], gradient) != changed, name
        if changed:  # only where that value is multiplied
            assert torch.equal(rounded[2][name][..., 1:], gradient[..., 1:])


def test_a_dispatcher_is_told_whichever_comes_first():
    moe = MoE(small_config())
    round_expert_tokens(moe, Block())
    first = moe.dispatcher
    assert first.row_format is moe.token_format and moe.token_format.how == HOW
    moe.use_dispatcher(LocalDispatcher(12))
    assert moe.dispatcher is not first and moe.dispatcher.row_format is moe.token_format
    round_expert_tokens(moe, None)
    assert moe.dispatcher.row_format is moe.token_format is None
