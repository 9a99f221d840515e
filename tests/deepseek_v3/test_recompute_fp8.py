"""What backward sees of values that were kept in FP8, and that forward sees nothing of it."""

import pytest
import torch
import torch.nn.functional as F

from lightning_dualpipe.deepseek_v3.block import DenseBlock, MoEBlock
from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.deepseek_v3.mlp import MLP
from lightning_dualpipe.deepseek_v3.recompute import compute_phase, kept_in_fp8
from lightning_dualpipe.deepseek_v3.rope import Rotary
from lightning_dualpipe.precision.fp8_rows import FP8Rows, round_expert_tokens
from lightning_dualpipe.precision.grouped_linear import grouped_linear
from lightning_dualpipe.precision.recipe import Block
from tests.deepseek_v3.kept import bytes_alive_after
from tests.deepseek_v3.small import random_batch, randomize, small_config
from tests.deepseek_v3.test_recompute import build, step

ROWS = FP8Rows(Block().activation)
COUNTS = [5, 0, 9]


def in_a_phase(function, recompute, *values):
    (y,) = compute_phase("test", lambda *given: (function(*given),), recompute)(values, {})
    return y


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def swiglu(gate_up, weights):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_experts_are_those_of_swiglu_at_what_is_left_of_its_inputs(dtype):
    """Cut before SwiGLU: behind the cut everything is computed, by autograd, from rounded gates and ups."""
    experts = randomize(Experts(3, 40, 75)).to(dtype)
    x, weights, g = draw(14, 40, dtype=dtype), draw(14, seed=1, dtype=dtype), draw(14, 40, seed=2, dtype=dtype)
    inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = in_a_phase(lambda x, w: experts(x, w, torch.tensor(COUNTS)), "selective_fp8", *inputs)
    y.backward(g)

    x, weights = x.requires_grad_(), weights.requires_grad_()
    gate_up_weight, down_weight = (p.detach().clone().requires_grad_() for p in experts.parameters())
    gate_up = grouped_linear(x, gate_up_weight, COUNTS)
    assert torch.equal(y, experts(x, weights, torch.tensor(COUNTS))), "forward has all its bits"
    left = ROWS.round(gate_up.detach()).requires_grad_()
    grouped_linear(swiglu(left, weights), down_weight, COUNTS).backward(g)
    gate_up.backward(left.grad)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}[dtype]  # silu's derivative, written in another way
    for got, want in (
        (inputs[0].grad, x.grad),
        (inputs[1].grad, weights.grad),
        (experts.gate_up_proj.grad, gate_up_weight.grad),
        (experts.down_proj.grad, down_weight.grad),
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    assert not torch.equal(left.detach(), gate_up.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_they_are_the_very_bits_that_the_rounded_values_give(dtype):
    """The layer's own backward, whose saved values are rounded by hand."""
    experts = randomize(Experts(3, 40, 75)).to(dtype)
    x, weights, g = draw(14, 40, dtype=dtype), draw(14, seed=1, dtype=dtype), draw(14, 40, seed=2, dtype=dtype)

    def gradients(recompute, gate_up=None):
        if gate_up is not None:
            experts.grouped_matmuls["gate_up_proj"] = gate_up
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        experts.zero_grad()
        y = in_a_phase(lambda x, w: experts(x, w, torch.tensor(COUNTS)), recompute, *inputs)
        y.backward(g)
        return y.detach(), [each.grad for each in (*inputs, *experts.parameters())]

    _, got = gradients("selective_fp8")
    rounding = lambda *given: ROWS.round(grouped_linear(*given))  # noqa: E731
    _, want = gradients("none", rounding)  # forward is another one, backward the same
    assert all(map(torch.equal, got, want))


def test_shared_experts_keep_gate_and_up_so_too():
    mlp = randomize(MLP(40, 75))
    x, g = draw(6, 40).requires_grad_(), draw(6, 40, seed=1)
    y = in_a_phase(mlp, "selective_fp8", x)
    y.backward(g)
    got = [x.grad, *(p.grad for p in mlp.parameters())]
    assert torch.equal(y, mlp(x))

    x.grad = None
    mlp.zero_grad()
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.register_forward_hook(lambda module, given, out: ROWS.round(out))
    mlp(x).backward(g)
    assert all(map(torch.equal, got, [x.grad, *(p.grad for p in mlp.parameters())]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tokens_that_are_on_the_grid_lose_nothing(dtype):
    x = ROWS.round(draw(64, 300, dtype=dtype)).requires_grad_()
    weight = draw(20, 300, seed=1, dtype=dtype).requires_grad_()

    def product(x):
        return kept_in_fp8(x) @ weight.mT

    def gradients(recompute):
        return torch.autograd.grad(in_a_phase(product, recompute, x).float().square().sum(), (x, weight))

    assert all(map(torch.equal, gradients("selective_fp8"), gradients("none")))
    assert not any(
        torch.equal(weight_gradient, gradients("none")[1])
        for weight_gradient in [torch.autograd.grad(in_a_phase(product, "selective_fp8", x + 0.01).sum(), weight)[0]]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_half_the_memory_of_swiglus_inputs_is_kept(dtype):
    experts = randomize(Experts(3, 40, 128)).to(dtype)
    x, weights = draw(14, 40, dtype=dtype).requires_grad_(), draw(14, dtype=dtype).requires_grad_()

    def kept(recompute):
        run = lambda x, w: experts(x, w, torch.tensor(COUNTS))  # noqa: E731
        return bytes_alive_after(lambda: in_a_phase(run, recompute, x, weights))

    plain, in_fp8 = 14 * 256 * dtype.itemsize, 14 * (256 + 2 * 4)
    assert kept("selective") - kept("selective_fp8") == plain - in_fp8


@pytest.mark.parametrize("rounded", [False, True], ids=["tokens_as_they_are", "tokens_in_fp8"])
def test_a_model_has_the_same_losses_and_nearly_the_same_gradients(rounded):
    """10 %: a value in FP8 is off by up to 1/16 of itself, by a fortieth on average; and these weights are large."""
    batch = random_batch(small_config(), 2, 12, ignored=3)
    found = []
    for recompute, deferring in (("none", False), ("selective_fp8", False), ("selective_fp8", True)):
        model = build(recompute)
        round_expert_tokens(model, Block() if rounded else None)
        found.append(step(model, batch, deferring=deferring))
    (means, want, counts), (again, got, counted), (_, deferred, _) = found
    assert all(torch.equal(again[name], mean) for name, mean in means.items())
    assert all(torch.equal(counted[name], count) for name, count in counts.items())
    assert all(torch.equal(deferred[name], gradient) for name, gradient in got.items())
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 0.1 * gradient.norm(), name
    assert not torch.equal(got["blocks.1.mlp.experts.down_proj"], want["blocks.1.mlp.experts.down_proj"])


def test_dense_layers_keep_what_they_kept():
    config = small_config()
    h = draw(2, 9, 24).requires_grad_()

    def kept(kind, recompute):
        block = randomize(kind(config, Rotary(config), recompute=recompute))
        block(h, h.new_zeros(2))
        return bytes_alive_after(lambda: block(h, h.new_zeros(2)))

    assert kept(DenseBlock, "selective_fp8") == kept(DenseBlock, "selective")
    assert kept(MoEBlock, "selective_fp8") < kept(MoEBlock, "selective")
