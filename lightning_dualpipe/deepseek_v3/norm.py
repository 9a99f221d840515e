"""RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight``.

Statistics are taken in at least float32 and rounded back before the weight multiplies, as the
released weights expect. Backward is written out: it keeps one number per row instead of copies of
``x``, with

    n = x / rms     dx = (g w - n mean(g w n)) / rms     dw = sum over rows of g n

Shapes: D width; any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = _widened(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        normed = (wide * scale).to(x.dtype)
        return normed.mul_(weight_D) if weight_D.dtype == x.dtype else normed * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        normed = _widened(x) * scale
        grad_times_normed = _widened(grad) * normed
        grad_weight_D = grad_times_normed.reshape(-1, x.shape[-1]).sum(0).to(weight_D.dtype)
        mean = (grad_times_normed @ weight_D.to(scale.dtype) / x.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(_widened(grad), weight_D, out=grad_times_normed).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight_D, None


def _widened(x: Tensor) -> Tensor:
    """At least float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
