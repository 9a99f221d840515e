"""Blocks and prediction modules: their definition, and that the phases are their forward."""

import pytest
import torch

from lightning_dualpipe.deepseek_v3.block import DenseBlock, MoEBlock
from lightning_dualpipe.deepseek_v3.mtp import MTP
from lightning_dualpipe.deepseek_v3.rope import Rotary
from tests.deepseek_v3.small import randomize, small_config, weights_of
from tests.oracles import deepseek_v3 as oracle

KINDS = {"dense": DenseBlock, "moe": MoEBlock}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_and_its_gradients_are_those_of_the_definition(kind):
    config = small_config()
    block = randomize(KINDS[kind](config, Rotary(config)))
    weights = weights_of(block)
    h = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    before = torch.rand(2, dtype=torch.float64)

    y, balance = block(h, before)
    pairs = [oracle.block(config, weights, sequence, moe=kind == "moe") for sequence in h]
    want, own = (torch.stack(part) for part in zip(*pairs, strict=True))

    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(balance, before + own, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    parameters = dict(block.named_parameters())
    got_grads = torch.autograd.grad((y * g).sum() + balance.sum(), [h, *parameters.values()])
    want_grads = torch.autograd.grad(
        (want * g).sum() + own.sum(), [h, *(weights[name] for name in parameters)], materialize_grads=True
    )
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prediction_module_is_that_of_the_definition(depth):
    config = small_config()
    mtp = randomize(MTP(config, Rotary(config), depth=depth))
    h, ahead = torch.randn(2, 2, 6, 24, dtype=torch.float64)

    y, balance = mtp(h, ahead, torch.zeros(2, dtype=torch.float64))
    pairs = [oracle.mtp(config, weights_of(mtp), *sequence) for sequence in zip(h, ahead, strict=True)]
    want, own = (torch.stack(part) for part in zip(*pairs, strict=True))

    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(balance, own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "phases"),
    [
        ("dense", ["attend", "feed_forward"]),
        ("moe", ["attend", "dispatch", "shared_experts", "experts", "combine", "add"]),
    ],
)
def test_phases_one_graph_each_give_the_gradients_of_the_whole(kind, phases):
    """As an overlapping pipeline runs them: every phase on detached inputs, backward in reverse."""
    config = small_config()
    block = randomize(KINDS[kind](config, Rotary(config)))
    inputs = torch.randn(2, 7, 24, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    g = torch.randn(2, 7, 24, dtype=torch.float64)
    assert [phase.name for phase in block.phases()] == phases
    assert [phase.name for phase in block.phases() if phase.launch] == [
        name for name in phases if name in ("dispatch", "combine")
    ]
    assert not any(phase.communicates for phase in block.phases())  # all experts are here

    leaves = [value.clone().requires_grad_() for value in inputs]
    want = block(*leaves)
    torch.autograd.backward(want, [g, torch.ones(2, dtype=torch.float64)])
    want_grads = [leaves[0].grad, *(parameter.grad for parameter in block.parameters())]
    block.zero_grad()

    graphs, values = [], inputs
    for phase in block.phases():
        values = tuple(_leaf(value) for value in values)
        outputs = phase(values, {})
        graphs.append((values, outputs))
        values = outputs
    assert torch.equal(values[0], want[0]) and torch.equal(values[1], want[1])

    grads = [g, torch.ones(2, dtype=torch.float64)]
    for values, outputs in reversed(graphs):
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        grads = [getattr(value, "grad", None) for value in values]
    torch.testing.assert_close(
        [grads[0], *(parameter.grad for parameter in block.parameters())], want_grads, rtol=1e-13, atol=1e-13
    )


def _leaf(value):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.requires_grad_() if value.is_floating_point() else value
    return value


def test_phases_of_a_prediction_module_carry_the_shallower_depths_along():
    config = small_config()
    mtp = randomize(MTP(config, Rotary(config), depth=2))
    embed = torch.nn.Embedding(config.vocab_size, 24, dtype=torch.float64)
    input_ids = torch.randint(config.vocab_size, (2, 9))
    h, h_1 = torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(2, 8, 24, dtype=torch.float64)
    before = torch.rand(2, dtype=torch.float64)

    values = (h, h_1, before)
    for phase in mtp.phases(embed):
        values = phase(values, {"input_ids": input_ids})

    want, balance = mtp(h_1[:, :7], embed(input_ids[:, 2:]), before)
    assert values[0] is h and values[1] is h_1
    assert torch.equal(values[2], want) and torch.equal(values[3], balance)
    names = [phase.name for phase in mtp.phases(embed)]
    assert names == ["join", "attend", "dispatch", "shared_experts", "experts", "combine", "add", "norm"]
    assert [phase.skips for phase in mtp.phases(embed)] == [0, 2, 2, 5, 2, 2, 2, 2]
