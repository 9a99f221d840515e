"""One linear map per expert over rows that are sorted by expert, with weight gradients that can wait.

    y[rows of e] = x[rows of e] W_e^T          grad_W_e = g[rows of e]^T x[rows of e]

On CUDA in bfloat16 all experts are one kernel launch (``torch.nn.functional.grouped_mm``) that
reads the group ends from device memory. Elsewhere it is a loop, which must know the counts on the
host: for counts that live on a GPU that is one synchronisation. An expert without rows gets a
gradient of zeros, never none: optimizers and gradient reductions then see it on every rank.

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
    """``y_RO``: the first ``counts[0]`` rows times ``weight_EOI[0].T``, the next ``counts[1]`` times ..."""
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
        groups = _groups(x_RI, cast_EOI, counts)
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


def _weight_gradient(groups: _Loop | _Kernel, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
    with without_autocast(grad_RO):
        return groups.products(grad_RO, x_RI)


def _groups(x_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int] | Tensor) -> _Loop | _Kernel:
    if _kernel_takes(x_RI, weight_EOI):
        counts_E = counts if isinstance(counts, Tensor) else torch.tensor(counts)
        return _Kernel(counts_E.to(x_RI.device).cumsum(0, dtype=torch.int32))
    sizes = counts.tolist() if isinstance(counts, Tensor) else counts
    ends = tuple(accumulate(sizes, initial=0))
    assert ends[-1] == len(x_RI), f"counts add up to {ends[-1]}, there are {len(x_RI)} rows"
    return _Loop(ends)


def _kernel_takes(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    """``grouped_mm`` wants bfloat16, compute capability 8.0 and rows that start at multiples of 16 bytes."""
    if not x_RI.is_cuda or x_RI.dtype != torch.bfloat16 or weight_EOI.dtype != torch.bfloat16 or len(x_RI) == 0:
        return False
    aligned = weight_EOI.shape[1] % 8 == 0 and weight_EOI.shape[2] % 8 == 0
    return aligned and torch.cuda.get_device_capability(x_RI.device) >= (8, 0)


@dataclass(frozen=True, slots=True)
class _Loop:
    """One matrix multiplication per expert, into one output."""

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


@dataclass(frozen=True, slots=True)
class _Kernel:
    """All experts in one launch. Expanded gradients are refused, hence the copies."""

    ends_E: Tensor  # int32, on the device

    def rows_times(self, a_RA: Tensor, b_EAB: Tensor) -> Tensor:
        return F.grouped_mm(a_RA.contiguous(), b_EAB, offs=self.ends_E)

    def products(self, a_RA: Tensor, b_RB: Tensor) -> Tensor:
        out_EAB = F.grouped_mm(a_RA.contiguous().mT, b_RB.contiguous(), offs=self.ends_E)
        if torch.cuda.get_device_capability(a_RA.device)[0] != 9:  # others leave groups without rows unwritten
            empty_E = self.ends_E.diff(prepend=self.ends_E.new_zeros(1)) == 0  # (pytorch issue 172439)
            out_EAB.masked_fill_(empty_E[:, None, None], 0)
        return out_EAB
