"""One linear map per expert over rows that are sorted by expert, with weight gradients that can wait.

    y[rows of e] = x[rows of e] W_e^T          grad_W_e = g[rows of e]^T x[rows of e]

Where ``torch.nn.functional.grouped_mm`` can, all experts are one call; on CUDA in bfloat16 that is
one kernel, which reads the ends of the groups from device memory. Elsewhere (float64, odd sizes) it
is a loop, which must know the counts on the host: if they live on a GPU, that is one
synchronisation. On the CPU both give the same bits. An expert without rows gets a gradient of
zeros, never none: optimizers and gradient reductions then see it on every rank.

Shapes: R rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.weight_gradients import autocast_to, now_or_later, without_autocast

__all__ = ["grouped_linear"]


def grouped_linear(
    x_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int] | Tensor, queue: WeightGradients | None = None
) -> Tensor:
    """``y_RO``: the first ``counts[0]`` rows times ``weight_EOI[0].T``, the next ``counts[1]`` times ...

    ``counts`` (int64 if a tensor, on any device) add up to R. A tensor on a GPU is not checked for that.
    """
    assert x_RI.dim() == 2 and weight_EOI.dim() == 3, f"got {tuple(x_RI.shape)} and {tuple(weight_EOI.shape)}"
    assert len(counts) == len(weight_EOI), f"{len(counts)} counts for {len(weight_EOI)} experts"
    y_RO: Tensor = _GroupedLinear.apply(autocast_to(x_RI), weight_EOI, counts, queue)
    return y_RO


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int] | Tensor, queue: WeightGradients | None
    ) -> Tensor:
        cast_EOI = autocast_to(weight_EOI)
        groups = _choose(x_RI, cast_EOI, counts)
        ctx.save_for_backward(x_RI if weight_EOI.requires_grad else None, weight_EOI)
        ctx.parameter = weight_EOI  # the object that owns ``.grad``; a saved tensor may come back as a copy
        ctx.groups, ctx.queue, ctx.cast = groups, queue, cast_EOI.dtype
        return groups.rows_times(x_RI, cast_EOI.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RI, weight_EOI = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_RI = grad_EOI = None
        if needs_x:
            with without_autocast(grad_RO):
                grad_RI = ctx.groups.rows_times(grad_RO, weight_EOI.to(ctx.cast))
        if needs_weight:
            grad_EOI = now_or_later(ctx.parameter, ctx.queue, partial(_weight_gradient, ctx.groups, grad_RO, x_RI))
        return grad_RI, grad_EOI, None, None


def _weight_gradient(groups: _Loop | _Grouped, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
    with without_autocast(grad_RO):
        return groups.products(grad_RO, x_RI)


def _choose(x_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int] | Tensor) -> _Loop | _Grouped:
    if x_RI.is_cuda and isinstance(counts, Tensor) and _grouped_mm_takes(x_RI, weight_EOI):
        return _Grouped(counts.to(x_RI.device).cumsum(0, dtype=torch.int32))
    bounds = tuple(accumulate(counts.tolist() if isinstance(counts, Tensor) else counts, initial=0))
    assert bounds[-1] == len(x_RI), f"counts add up to {bounds[-1]}, there are {len(x_RI)} rows"
    if _grouped_mm_takes(x_RI, weight_EOI):
        ends_E = torch.tensor(bounds[1:], dtype=torch.int32)
        return _Grouped(ends_E.to(x_RI.device, non_blocking=True))
    return _Loop(bounds)


def _grouped_mm_takes(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    """It wants rows of all operands to start at multiples of 16 bytes. On CUDA only bfloat16 is worth it."""
    dtypes = (torch.bfloat16,) if x_RI.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    fits = x_RI.dtype == weight_EOI.dtype and x_RI.dtype in dtypes and weight_EOI.is_contiguous()
    sizes = *(size * weight_EOI.itemsize for size in weight_EOI.shape[1:]), weight_EOI.data_ptr()
    if not fits or len(x_RI) == 0 or any(size % 16 for size in sizes):
        return False
    return not x_RI.is_cuda or torch.cuda.get_device_capability(x_RI.device) >= (8, 0)


@dataclass(frozen=True, slots=True)
class _Loop:
    """One matrix multiplication per expert, into one output: the definition."""

    bounds: tuple[int, ...]  # 0, end of group 0, end of group 1, ...

    def rows_times(self, a_RA: Tensor, b_EAB: Tensor) -> Tensor:
        out_RB = a_RA.new_empty(len(a_RA), b_EAB.shape[-1])
        for b_AB, (start, end) in zip(b_EAB, pairwise(self.bounds), strict=True):
            if start < end:
                torch.mm(a_RA[start:end], b_AB, out=out_RB[start:end])
        return out_RB

    def products(self, a_RA: Tensor, b_RB: Tensor) -> Tensor:
        out_EAB = a_RA.new_empty(len(self.bounds) - 1, a_RA.shape[-1], b_RB.shape[-1])
        for out_AB, (start, end) in zip(out_EAB, pairwise(self.bounds), strict=True):
            torch.mm(a_RA[start:end].T, b_RB[start:end], out=out_AB)  # zeros if there are no rows
        return out_EAB


@dataclass(frozen=True, slots=True, eq=False)
class _Grouped:
    """All experts in one call."""

    ends_E: Tensor  # int32, on the device of the rows

    def rows_times(self, a_RA: Tensor, b_EAB: Tensor) -> Tensor:
        return F.grouped_mm(_aligned(a_RA), b_EAB, offs=self.ends_E)

    def products(self, a_RA: Tensor, b_RB: Tensor) -> Tensor:
        out_EAB = F.grouped_mm(_aligned(a_RA).mT, _aligned(b_RB), offs=self.ends_E)
        if out_EAB.is_cuda and torch.cuda.get_device_capability(out_EAB.device)[0] != 9:
            # Blackwell leaves groups without rows unwritten (pytorch issue 172439); Hopper writes zeros
            empty_E = self.ends_E.diff(prepend=self.ends_E.new_zeros(1)) == 0
            out_EAB.masked_fill_(empty_E[:, None, None], 0)
        return out_EAB


def _aligned(x: Tensor) -> Tensor:
    """Expanded gradients and views that start anywhere are refused by the kernels."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
