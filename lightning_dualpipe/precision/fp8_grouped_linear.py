"""``grouped_linear`` with operands in FP8: each expert's rows are quantised by themselves.

Tiles never reach over the edge of an expert's rows, so rows of zeros behind them change nothing.

Shapes: R rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.fp8_linear import Multiply, Operands
from lightning_dualpipe.precision.fp8_weight import QuantisedWeight
from lightning_dualpipe.precision.reference import Quantised, quantise
from lightning_dualpipe.precision.weight_gradients import autocast_to, check_dtypes, now_or_later, without_autocast

__all__ = ["FP8GroupedLinear"]


class FP8GroupedLinear:
    """The matmul of one stack of experts: one product per expert that has rows."""

    def __init__(self, operands: Operands, weight: QuantisedWeight, multiply: Multiply) -> None:
        self.activation, _, self.gradient = operands
        self.weight = weight
        self.multiply = multiply

    def __call__(
        self, x_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int] | Tensor, queue: WeightGradients | None
    ) -> Tensor:
        check_dtypes(x_RI, weight_EOI)
        y_RO: Tensor = _FP8GroupedLinear.apply(
            autocast_to(x_RI), weight_EOI, counts, queue, self, torch.is_grad_enabled()
        )
        return y_RO


class _FP8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        weight_EOI: Tensor,
        counts: Sequence[int] | Tensor,
        queue: WeightGradients | None,
        layer: FP8GroupedLinear,
        keep: bool,
    ) -> Tensor:
        bounds = tuple(accumulate(counts.tolist() if isinstance(counts, Tensor) else counts, initial=0))
        assert bounds[-1] == len(x_RI), f"counts add up to {bounds[-1]}, there are {len(x_RI)} rows"
        ctx.save_for_backward(x_RI if weight_EOI.requires_grad else None, weight_EOI)
        ctx.parameter, ctx.queue, ctx.layer, ctx.bounds, ctx.dtype = weight_EOI, queue, layer, bounds, x_RI.dtype
        with without_autocast(x_RI):
            y_RO = x_RI.new_empty(len(x_RI), weight_EOI.shape[1])
            for rows, weight in zip(_slices(bounds), layer.weight.rows(weight_EOI, keep=keep), strict=True):
                _multiply_into(y_RO[rows], layer, x_RI[rows], layer.activation, weight)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x_RI, _ = ctx.saved_tensors  # asked for, torch says if the weight was written to meanwhile
        weight_EOI: Tensor = ctx.parameter
        layer: FP8GroupedLinear = ctx.layer
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_RI = grad_EOI = None
        if needs_x:
            with without_autocast(grad_RO):
                grad_RI = grad_RO.new_empty(len(grad_RO), weight_EOI.shape[2], dtype=ctx.dtype)
                for rows, weight in zip(_slices(ctx.bounds), layer.weight.columns(weight_EOI), strict=True):
                    _multiply_into(grad_RI[rows], layer, grad_RO[rows], layer.gradient, weight)
        if needs_weight:
            compute = partial(_weight_gradient, layer, ctx.bounds, grad_RO, x_RI)
            grad_EOI = now_or_later(ctx.parameter, ctx.queue, compute)
        return grad_RI, grad_EOI, None, None, None, None


def _multiply_into(out: Tensor, layer: FP8GroupedLinear, rows: Tensor, how: Any, weight: Quantised) -> None:
    if len(rows):
        out.copy_(layer.multiply(quantise(rows, how), weight, out.dtype))


def _weight_gradient(layer: FP8GroupedLinear, bounds: Sequence[int], grad_RO: Tensor, x_RI: Tensor) -> Tensor:
    """An expert without rows has a gradient of zeros."""
    with without_autocast(grad_RO):
        grad_EOI = grad_RO.new_zeros(len(bounds) - 1, grad_RO.shape[1], x_RI.shape[1])
        for grad_OI, rows in zip(grad_EOI, _slices(bounds), strict=True):
            if rows.stop > rows.start:
                g, a = quantise(grad_RO[rows].mT, layer.gradient), quantise(x_RI[rows].mT, layer.activation)
                grad_OI.copy_(layer.multiply(g, a, grad_OI.dtype))
        return grad_EOI


def _slices(bounds: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(bounds)]
