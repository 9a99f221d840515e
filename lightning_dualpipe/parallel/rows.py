"""One row per (token, chosen expert): copied, sorted by expert, and summed up again.

    token n, its k-th expert  =  pair n * K + k  ◄──order_R── row        rows of expert 0, then of expert 1, ...
                                                 ──position_NK──►

Indexing with these permutations would do, but its gradient is a scatter-add, which on a GPU adds in
whatever order threads arrive. Here the backward of spreading is collecting and the other way round,
both in a fixed order, so results do not change from run to run or with the number of tokens.

Shapes: N tokens, K experts chosen per token, R = N * K rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["RowOrder", "invert", "permute_rows"]


@dataclass(frozen=True, slots=True, eq=False)
class RowOrder:
    """The (token, k) pairs of N tokens, sorted by expert; pairs of one expert by token."""

    expert_R: Tensor  # expert of each row, ascending
    order_R: Tensor  # row -> pair n * K + k
    position_NK: Tensor  # pair -> row

    @classmethod
    def by_expert(cls, experts_NK: Tensor) -> RowOrder:
        expert_R, order_R = torch.sort(experts_NK.flatten(), stable=True)
        return cls(expert_R, order_R, invert(order_R).view(experts_NK.shape))

    def counts(self, num_experts: int) -> Tensor:
        """Rows per expert. (``bincount`` would wait for the device to learn its own size.)"""
        ends_E = torch.searchsorted(self.expert_R, self._experts(num_experts), right=True)
        return ends_E.diff(prepend=ends_E.new_zeros(1))

    def spread(self, x_ND: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        """``x_RD, weights_R``: one row per pair."""
        weights_R = permute_rows(weights_NK.flatten(), self.order_R, self.position_NK.flatten())
        return _Spread.apply(x_ND, self.order_R, self.position_NK), weights_R

    def collect(self, y_RD: Tensor) -> Tensor:
        """``y_ND``: the rows of each token summed in the order of k."""
        collected: Tensor = _Collect.apply(y_RD, self.order_R, self.position_NK)
        return collected

    def _experts(self, num_experts: int) -> Tensor:
        return torch.arange(num_experts, device=self.expert_R.device, dtype=self.expert_R.dtype)


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` for a permutation; its gradient is a permutation too, where indexing would scatter-add."""
    permuted: Tensor = _Permute.apply(x, order, inverse)
    return permuted


def invert(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None


class _Spread(torch.autograd.Function):
    """Copy each token K times. Backward is ``_Collect``, so it adds in a fixed order too."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, position_NK: Tensor) -> Tensor:
        ctx.position_NK = position_NK
        return _copy_tokens(x_ND, order_R, position_NK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return _sum_rows(grad_RD, ctx.position_NK), None, None


class _Collect(torch.autograd.Function):
    """Sum the K rows of each token. Backward is ``_Spread``."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, position_NK: Tensor) -> Tensor:
        ctx.order_R = order_R
        ctx.top_k = position_NK.shape[1]
        return _sum_rows(y_RD, position_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return _copy_tokens(grad_ND, ctx.order_R, ctx.top_k), None, None


def _copy_tokens(x_ND: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    return x_ND.index_select(0, order_R.div(top_k, rounding_mode="floor"))


def _sum_rows(y_RD: Tensor, position_NK: Tensor) -> Tensor:
    """One addition after the other: ``sum`` may pick another order for another N, and so other bits.

    Half types are added up in float32 and rounded once.
    """
    dtype = torch.promote_types(y_RD.dtype, torch.float32)
    y_ND = y_RD.index_select(0, position_NK[:, 0]).to(dtype)
    for position_N in position_NK.unbind(1)[1:]:
        y_ND += y_RD.index_select(0, position_N)
    return y_ND.to(y_RD.dtype)
