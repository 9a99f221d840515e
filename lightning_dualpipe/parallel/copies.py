"""One copy of a row for every place it is wanted at, however many of its choices lie there; and their sum.

    places_RK    row r:  2 0 2        ──spread──►  copies sorted by place, those of one place by row
                                      ◄─collect──  the copies of each row, summed in the order of places

A place is a node, a rank, or an expert; a choice that lies elsewhere has the place ``num_places``. As in
``parallel.rows``, spreading and collecting are each other's backward, and both add in a fixed order.

Shapes: R rows, K choices of each, C copies, J copies of one row at most, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dualpipe.parallel.rows import RowOrder

__all__ = ["Copies", "Places", "place_of"]


def place_of(experts_RK: Tensor, *, first: int, per_place: int, num_places: int) -> Tensor:
    """The place of each expert, where place 0 begins with the expert ``first`` and each has ``per_place``."""
    place_RK = (experts_RK - first).div(per_place, rounding_mode="floor")
    return place_RK.masked_fill((place_RK < 0) | (place_RK >= num_places), num_places)


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where rows are wanted, each place once. How many copies that makes only the device knows."""

    num_places: int
    sorted_by_place: RowOrder  # of the choices of each row, sorted and without repetitions
    choice_RK: Tensor  # which choice of its row each of them was

    @classmethod
    def of(cls, places_RK: Tensor, num_places: int) -> Places:
        place_RK, choice_RK = places_RK.sort(dim=1, stable=True)
        again_RK = torch.zeros_like(place_RK, dtype=torch.bool)
        again_RK[:, 1:] = place_RK[:, 1:] == place_RK[:, :-1]
        return cls(num_places, RowOrder.by_expert(place_RK.masked_fill(again_RK, num_places)), choice_RK)

    def counts(self) -> Tensor:
        """Copies for each place."""
        return self.sorted_by_place.counts(self.num_places)

    def copies(self, number: int) -> Copies:
        """``number`` is the sum of ``counts``."""
        order, top_k = self.sorted_by_place, self.choice_RK.shape[1]
        pair_C = order.order_R[:number]
        row_C = pair_C.div(top_k, rounding_mode="floor")
        position_RJ = order.position_NK.sort(dim=1).values[:, : self.num_places].clamp(max=number)
        return Copies(row_C, row_C * top_k + self.choice_RK.flatten()[pair_C], position_RJ)


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    row_C: Tensor  # the row that each is a copy of
    pair_C: Tensor  # its first choice that lies at the place of the copy, as r * K + k
    position_RJ: Tensor  # the copies of each row in order; C where it has fewer

    def spread(self, x_RD: Tensor) -> Tensor:
        """``x_CD``: the copies."""
        spread: Tensor = _Spread.apply(x_RD, self.row_C, self.position_RJ)
        return spread

    def collect(self, y_CD: Tensor) -> Tensor:
        """``y_RD``: the copies of each row summed up, half types in float32."""
        collected: Tensor = _Collect.apply(y_CD, self.row_C, self.position_RJ)
        return collected


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, row_C: Tensor, position_RJ: Tensor) -> Tensor:
        ctx.position_RJ = position_RJ
        return x_RD.index_select(0, row_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, None, None]:
        return _sum_copies(grad_CD, ctx.position_RJ), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, row_C: Tensor, position_RJ: Tensor) -> Tensor:
        ctx.row_C = row_C
        return _sum_copies(y_CD, position_RJ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return grad_RD.index_select(0, ctx.row_C), None, None


def _sum_copies(y_CD: Tensor, position_RJ: Tensor) -> Tensor:
    """One addition after the other, so that the number of rows does not change the order, nor the bits."""
    number = len(y_CD)
    dtype = torch.promote_types(y_CD.dtype, torch.float32)
    y_RD = torch.zeros(len(position_RJ), *y_CD.shape[1:], dtype=dtype, device=y_CD.device)
    if number:
        for position_R in position_RJ.unbind(1):
            copy_RD = y_CD.index_select(0, position_R.clamp(max=number - 1))
            y_RD += copy_RD.masked_fill_((position_R == number).unsqueeze(1), 0)
    return y_RD.to(y_CD.dtype)
