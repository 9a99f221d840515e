"""What dispatchers have in common that send copies of tokens: one to a rank, however many of its experts it is for.

    x_ND ══send══► x_CD ──unpack──► x_RD, one row per (token, expert) of this rank, sorted by expert
    y_ND ◄══send_back══ y_CD ◄──gather── y_RD                    the rows of each copy summed

All K weights and experts of a token travel with each copy. How copies travel, and who sums them on the
way home, is for subclasses to say. An expert meets its rows in the order of (rank, token), as on one
rank with all tokens, so its gradient has the same bits there. The rows of a token are summed by rank
and then by node, so that those sums agree up to rounding.

Shapes: N tokens here, C copies that came here, K experts chosen per token, R rows, E local experts, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_dualpipe.interface import Flight
from lightning_dualpipe.parallel.copies import Copies, Places
from lightning_dualpipe.parallel.dispatch import Routing, TokenDispatcher

__all__ = ["CopyDispatcher", "CopyRouting", "Landed"]


@dataclass(frozen=True, slots=True, eq=False)
class Landed:
    """Copies that came here, in any order that keeps the tokens of one rank in theirs."""

    experts_CK: Tensor  # by local index; anything else is for others
    source_C: Tensor | int  # the rank that each came from; 0: they are sorted by that already
    num_sources: int
    num_rows: int  # (copy, local expert) pairs
    journey: Any  # the way they came, for ``send_back``


@dataclass(frozen=True, slots=True, eq=False)
class CopyRouting(Routing):
    rows: Copies  # of copies, one per local expert
    journey: Any


class CopyDispatcher(TokenDispatcher):
    """``send`` lands ``(x_CD, weights_CK, Landed)``, ``send_back`` ``(y_ND, routing)``."""

    crosses_ranks = True

    def pack(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x_ND, weights_NK, experts_NK  # how many copies to make, only ``send`` will know

    @abstractmethod
    def send(self, rows: Tensor, weights: Tensor, plan: Tensor) -> Flight: ...

    def unpack(self, rows: Tensor, weights: Tensor, plan: Landed) -> tuple[Tensor, Tensor, Routing]:
        num_experts, num_sources = self.num_local_experts, plan.num_sources
        local_CK = (plan.experts_CK >= 0) & (plan.experts_CK < num_experts)
        source_C1 = plan.source_C if isinstance(plan.source_C, int) else plan.source_C.unsqueeze(1)
        place_CK = plan.experts_CK * num_sources + source_C1
        elsewhere = num_experts * num_sources
        places = Places.of(place_CK.masked_fill(~local_CK, elsewhere), elsewhere)
        copies = places.copies(plan.num_rows)
        counts_E = places.counts().view(num_experts, num_sources).sum(1)
        weights_R = weights.flatten().index_select(0, copies.pair_C)
        return copies.spread(rows), weights_R, CopyRouting(counts_E, copies, plan.journey)

    def gather(self, y_RD: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, CopyRouting), "a routing belongs to the dispatcher that made it"
        return routing.rows.collect(y_RD)

    @abstractmethod
    def send_back(self, rows: Tensor, routing: Routing) -> Flight: ...

    def collect(self, rows: Tensor, routing: Routing) -> Tensor:
        return rows
