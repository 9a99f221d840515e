"""SwiGLU, ``silu(gate) * up``, alone and times the weight of an expert.

Backward is written out. It recomputes silu instead of keeping it, reuses one buffer, and writes the
gradients of gate and up side by side: with s = silu(gate) and an output gradient g,

    d up = w g s        d gate = w g up silu'(gate)        d w = sum over the row of g s up

Shapes: R rows, I intermediate width; ``gate_up_RJ`` holds gate, then up: J = 2 I.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["swiglu", "weighted_swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, of any shape."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


def weighted_swiglu(gate_up_RJ: Tensor, weights_R: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` [R, I]; products with float32 weights are rounded once."""
    y_RI: Tensor = _WeightedSwiGLU.apply(gate_up_RJ, weights_R)
    return y_RI


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        silu = F.silu(gate)
        grad_up = grad * silu
        return torch.ops.aten.silu_backward(torch.mul(grad, up, out=silu), gate), grad_up


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RJ: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_RJ, weights_R)
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=-1)
        return F.silu(gate_RI).mul_(up_RI).mul_(weights_R.unsqueeze(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RI: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_RJ, weights_R = ctx.saved_tensors
        weights_R1 = weights_R.unsqueeze(-1)
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=-1)
        grad_RJ = torch.empty_like(gate_up_RJ)
        grad_gate_RI, grad_up_RI = grad_RJ.chunk(2, dim=-1)

        buffer_RI = F.silu(gate_RI)
        torch.mul(grad_RI, buffer_RI, out=grad_up_RI)
        grad_R = torch.mul(grad_up_RI, up_RI, out=buffer_RI).sum(-1, dtype=weights_R.dtype)
        grad_up_RI.mul_(weights_R1)
        torch.mul(grad_RI, up_RI, out=buffer_RI).mul_(weights_R1)
        torch.ops.aten.silu_backward.grad_input(buffer_RI, gate_RI, grad_input=grad_gate_RI)
        return grad_RJ, grad_R
