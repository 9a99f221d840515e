"""SwiGLU, ``silu(gate) * up``, alone and times the weight of an expert.

Backward is written out. It recomputes silu instead of keeping it, reuses one buffer, and writes the
gradients of gate and up of an expert side by side: with s = silu(gate) and an output gradient g,

    d up = w g s        d gate = w g up silu'(gate)        d w = sum over the row of g s up

On CPUs it goes through the rows in pieces that fit into a core's cache; such a chain of elementwise
steps is bound by memory otherwise.

Shapes: R rows, I intermediate width; ``gate_up_RJ`` holds gate, then up: J = 2 I.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["swiglu", "weighted_swiglu"]

_IN_CACHE = 1 << 17  # elements of a piece


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` [.., I]."""
    y_RI: Tensor = _SwiGLU.apply(gate.flatten(0, -2), up.flatten(0, -2))
    return y_RI.view(gate.shape)


def weighted_swiglu(gate_up_RJ: Tensor, weights_R: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` [R, I]; a product with a float32 weight is rounded to the dtype of the rest."""
    y_RI: Tensor = _WeightedSwiGLU.apply(gate_up_RJ, weights_R)
    return y_RI


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_RI: Tensor, up_RI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_RI, up_RI)
        y_RI = torch.empty_like(up_RI)
        for rows in _pieces(y_RI):
            torch.mul(F.silu(gate_RI[rows]), up_RI[rows], out=y_RI[rows])
        return y_RI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, Tensor]:
        gate_RI, up_RI = ctx.saved_tensors
        grad_gate_RI, grad_up_RI = torch.empty_like(gate_RI), torch.empty_like(up_RI)
        for rows in _pieces(up_RI):
            buffer = F.silu(gate_RI[rows])
            torch.mul(grad_RI[rows], buffer, out=grad_up_RI[rows])
            torch.mul(grad_RI[rows], up_RI[rows], out=buffer)
            torch.ops.aten.silu_backward.grad_input(buffer, gate_RI[rows], grad_input=grad_gate_RI[rows])
        return grad_gate_RI, grad_up_RI


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RJ: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_RJ, weights_R)
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=-1)
        weights_R1 = weights_R.unsqueeze(-1)
        y_RI = torch.empty_like(up_RI, memory_format=torch.contiguous_format)
        for rows in _pieces(y_RI):
            torch.mul(F.silu(gate_RI[rows]).mul_(up_RI[rows]), weights_R1[rows], out=y_RI[rows])
        return y_RI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_RJ, weights_R = ctx.saved_tensors
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=-1)
        weights_R1 = weights_R.unsqueeze(-1)
        grad_RJ, grad_R = torch.empty_like(gate_up_RJ), torch.empty_like(weights_R)
        grad_gate_RI, grad_up_RI = grad_RJ.chunk(2, dim=-1)
        for rows in _pieces(grad_RI):
            grad, up, grad_up = grad_RI[rows], up_RI[rows], grad_up_RI[rows]
            buffer = F.silu(gate_RI[rows])
            torch.mul(grad, buffer, out=grad_up)
            torch.sum(torch.mul(grad_up, up, out=buffer), -1, dtype=weights_R.dtype, out=grad_R[rows])
            grad_up.mul_(weights_R1[rows])
            torch.mul(grad, up, out=buffer).mul_(weights_R1[rows])
            torch.ops.aten.silu_backward.grad_input(buffer, gate_RI[rows], grad_input=grad_gate_RI[rows])
        return grad_RJ, grad_R


def _pieces(x_RI: Tensor) -> Iterator[slice]:
    num_rows, width = x_RI.shape
    step = max(1, _IN_CACHE // width) if x_RI.device.type == "cpu" else max(1, num_rows)
    return (slice(start, start + step) for start in range(0, num_rows, step))
