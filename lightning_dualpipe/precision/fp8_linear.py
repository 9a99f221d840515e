"""``y = x W^T + b`` with operands in FP8: quantised by ``reference``, multiplied by a backend.

The gradient of the bias, and sums over microbatches, stay in high precision. The gradient of the weight
waits as that of ``linear`` does; it keeps ``x``, which is quantised along the tokens only then.

Shapes: N rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.fp8_weight import QuantisedWeight
from lightning_dualpipe.precision.recipe import Operand
from lightning_dualpipe.precision.reference import Quantised, quantise
from lightning_dualpipe.precision.weight_gradients import autocast_to, check_dtypes, now_or_later, without_autocast

__all__ = ["FP8Linear", "Multiply", "Operands"]

Multiply = Callable[[Quantised, Quantised, torch.dtype], Tensor]
"""``(a_MK, b_NK, dtype) -> a b^T`` in ``dtype``, as ``reference.multiply``."""
Operands = tuple[Operand, Operand, Operand]
"""How activations, weights and gradients are quantised."""


class FP8Linear:
    """The matmul of one layer."""

    def __init__(self, operands: Operands, weight: QuantisedWeight, multiply: Multiply) -> None:
        self.activation, _, self.gradient = operands
        self.weight = weight
        self.multiply = multiply

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, queue: WeightGradients | None) -> Tensor:
        check_dtypes(x, weight)
        y: Tensor = _FP8Linear.apply(autocast_to(x), weight, bias, queue, self, torch.is_grad_enabled())
        return y


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        queue: WeightGradients | None,
        layer: FP8Linear,
        keep: bool,
    ) -> Tensor:
        ctx.save_for_backward(x if weight_OI.requires_grad else None, weight_OI)
        ctx.parameters = weight_OI, bias_O  # the objects that own ``.grad``
        ctx.queue, ctx.layer, ctx.dtype = queue, layer, x.dtype
        with without_autocast(x):
            (weight,) = layer.weight.rows(weight_OI, keep=keep)
            y_NO = layer.multiply(quantise(_rows(x), layer.activation), weight, x.dtype)
            if bias_O is not None:
                y_NO += bias_O.to(x.dtype)
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, _ = ctx.saved_tensors  # asked for, torch says if the weight was written to meanwhile
        layer: FP8Linear = ctx.layer
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            with without_autocast(grad):
                (weight,) = layer.weight.columns(ctx.parameters[0])
                grad_NI = layer.multiply(quantise(_rows(grad), layer.gradient), weight, ctx.dtype)
            grad_x = grad_NI.view(*grad.shape[:-1], grad_NI.shape[-1])
        if needs_weight:
            grad_weight = now_or_later(ctx.parameters[0], ctx.queue, partial(_weight_gradient, layer, grad, x))
        if needs_bias:
            grad_bias = now_or_later(ctx.parameters[1], ctx.queue, partial(_bias_gradient, grad))
        return grad_x, grad_weight, grad_bias, None, None, None


def _weight_gradient(layer: FP8Linear, grad: Tensor, x: Tensor) -> Tensor:
    with without_autocast(grad):
        g, a = quantise(_rows(grad).mT, layer.gradient), quantise(_rows(x).mT, layer.activation)
        return layer.multiply(g, a, grad.dtype)


def _bias_gradient(grad: Tensor) -> Tensor:
    with without_autocast(grad):
        return _rows(grad).sum(0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
