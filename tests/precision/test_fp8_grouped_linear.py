"""Stacks of experts in FP8: each expert as a layer of its own, bit for bit."""

import pytest
import torch
from torch import nn

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision import fp8_weight, reference
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from lightning_dualpipe.precision.recipe import MXFP8, Block, Current

RECIPES = [Block(), Block("float32"), Current(), MXFP8()]
EXPERTS, INPUTS, OUTPUTS = 4, 144, 160
COUNTS = {
    "some to each": [37, 5, 1, 21],
    "an empty one in between": [37, 0, 130, 2],
    "empty ones at the ends": [0, 12, 9, 0],
    "all to one": [0, 0, 40, 0],
    "none at all": [0, 0, 0, 0],
}


def stack(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(EXPERTS, OUTPUTS, INPUTS, dtype=dtype, generator=torch.Generator().manual_seed(0)))


def by_expert(recipe, x_RI, weight_EOI, counts, grad_RO):
    """Output and gradients by the definition, one expert after the other."""
    parts = list(zip(x_RI.split(counts), weight_EOI.detach(), grad_RO.split(counts), strict=True))
    return (
        torch.cat([reference.forward(x, w, recipe) for x, w, _ in parts]),
        torch.cat([reference.grad_input(g, w, recipe) for _, w, g in parts]),
        torch.stack([reference.grad_weight(g, x, recipe) for x, _, g in parts]),
    )


@pytest.mark.parametrize(("as_tensor", "later"), [(False, False), (True, True)], ids=["list, now", "tensor, later"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_bit_is_that_of_one_layer_per_expert(recipe, counts, as_tensor, later):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(recipe, COUNTS[counts], dtype, as_tensor=as_tensor, later=later)


def check(recipe, counts, dtype, *, as_tensor, later):
    matmul, weight_EOI, queue = EmulateBackend(recipe).grouped_linear(), stack(dtype), WeightGradients()
    queue.deferring = later
    sums = torch.zeros_like(weight_EOI)
    for _ in range(2):
        x_RI = torch.randn(sum(counts), INPUTS, dtype=dtype, requires_grad=True)
        grad_RO = torch.randn(sum(counts), OUTPUTS, dtype=dtype)
        y_RO = matmul(x_RI, weight_EOI, torch.tensor(counts) if as_tensor else counts, queue)
        y_RO.backward(grad_RO)
        output, grad_input, grad_weight = by_expert(recipe, x_RI.detach(), weight_EOI, counts, grad_RO)
        assert torch.equal(y_RO, output) and torch.equal(x_RI.grad, grad_input)
        sums += grad_weight
    assert len(queue) == (2 if later else 0)
    queue.run(len(queue))
    assert weight_EOI.grad.dtype == dtype and torch.equal(weight_EOI.grad, sums)
    for expert, count in enumerate(counts):
        assert weight_EOI.grad[expert].any() == (count > 0)  # of zeros, never none


def test_one_weight_after_the_other_changes_and_all_are_seen():
    recipe = Block()
    backend, weight_EOI = EmulateBackend(recipe), stack()
    matmul, counts = backend.grouped_linear(), [3, 3, 3, 3]
    x_RI, grad_RO = torch.ones(12, INPUTS, requires_grad=True), torch.ones(12, OUTPUTS)
    for change in (
        lambda: torch.optim.AdamW([weight_EOI], lr=0.1, fused=True).step(),
        lambda: torch.optim.AdamW([weight_EOI], lr=0.1, foreach=True).step(),
        lambda: (weight_EOI.data[3].mul_(2), backend.weights_changed()),
        lambda: setattr(weight_EOI, "data", weight_EOI.data.flip(0)),
    ):
        x_RI.grad = None
        y_RO = matmul(x_RI, weight_EOI, counts, None)
        y_RO.backward(grad_RO)
        output, grad_input, _ = by_expert(recipe, x_RI.detach(), weight_EOI, counts, grad_RO)
        assert torch.equal(y_RO, output) and torch.equal(x_RI.grad, grad_input)
        change()
        assert not torch.equal(matmul(x_RI, weight_EOI, counts, None), output)


def test_each_expert_is_quantised_once_a_step(monkeypatch):
    made = []
    monkeypatch.setattr(fp8_weight, "quantise", lambda *args: made.append(1) or reference.quantise(*args))
    backend, weight_EOI = EmulateBackend(Block()), stack()
    matmul = backend.grouped_linear()
    for step in range(1, 3):
        for _ in range(3):
            x_RI = torch.randn(8, INPUTS, requires_grad=True)
            matmul(x_RI, weight_EOI, [2, 2, 2, 2], None).sum().backward()
        assert len(made) == EXPERTS * step
        backend.weights_changed()


def test_bfloat16_experts_have_float32_main_gradients():
    recipe, weight_EOI, counts = Block(), stack(torch.bfloat16), [20, 0, 30, 1]
    keep_main_gradients([weight_EOI])
    matmul, expected = EmulateBackend(recipe).grouped_linear(), torch.zeros(EXPERTS, OUTPUTS, INPUTS)
    for _ in range(3):
        x_RI, grad_RO = (torch.randn(51, size, dtype=torch.bfloat16) for size in (INPUTS, OUTPUTS))
        matmul(x_RI, weight_EOI, counts, None).backward(grad_RO)
        expected += by_expert(recipe, x_RI, weight_EOI, counts, grad_RO)[2].float()
    assert weight_EOI.grad.dtype == torch.float32 and torch.equal(weight_EOI.grad, expected)


def test_a_frozen_stack_queues_nothing_and_keeps_no_input():
    weight_EOI, queue = stack().requires_grad_(False), WeightGradients()
    queue.deferring = True
    x_RI = torch.randn(12, INPUTS, requires_grad=True)
    y_RO = EmulateBackend(Block()).grouped_linear()(x_RI, weight_EOI, [3, 3, 3, 3], queue)
    y_RO.sum().backward()
    assert len(queue) == 0 and weight_EOI.grad is None and x_RI.grad is not None


def test_autocast_rounds_rows_and_backward_keeps_the_format_of_its_forward():
    recipe, weight_EOI, counts = Block(), stack(), [3, 4, 0, 5]
    x_RI, grad_RO = torch.randn(12, INPUTS, requires_grad=True), torch.randn(12, OUTPUTS, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y_RO = EmulateBackend(recipe).grouped_linear()(x_RI, weight_EOI, counts, None)
    with torch.autocast("cpu", torch.float16):
        y_RO.backward(grad_RO)
    expected = by_expert(recipe, x_RI.detach().bfloat16(), weight_EOI, counts, grad_RO)
    assert torch.equal(y_RO, expected[0])
    assert torch.equal(x_RI.grad, expected[1].float()) and torch.equal(weight_EOI.grad, expected[2].float())


def test_counts_that_do_not_add_up_are_a_mistake():
    with pytest.raises(AssertionError, match="counts add up to 3, there are 12 rows"):
        EmulateBackend(Block()).grouped_linear()(torch.randn(12, INPUTS), stack(), [1, 1, 1, 0], None)
