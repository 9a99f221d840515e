"""Sending tokens to their experts and bringing the results home.

    x_ND ──dispatch──► x_RD, one row per (token, chosen expert), sorted by expert
                         │  expert e works on counts_E[e] neighbouring rows, times weights_R
    y_ND ◄──combine─── y_RD, the K rows of each token summed in the order of k

The dispatcher is the only seam for expert parallelism in model code. ``LocalDispatcher`` is the
definition, a stable sort; ``AllToAllDispatcher`` gives each token the same bits:

    sort by expert ──► all-to-all ──► rows of each source rank ──regroup──► rows of each expert
      = by destination rank: a rank holds neighbouring experts

Weights are applied on the expert side, so combine is a plain sum, and dispatch and combine are each
other's backward: what one spreads, the other sums. No token is ever dropped.

Shapes: N tokens, K experts chosen per token, R rows (N * K on one rank), E local experts, S ranks
of the expert group, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.all_to_all import Crossing, agree, cross
from lightning_dualpipe.parallel.rows import RowOrder, invert, permute_rows

__all__ = ["AllToAllDispatcher", "LocalDispatcher", "Routing", "SpreadsExperts", "TokenDispatcher"]


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Where the rows of one dispatch lie. Dispatchers add what they need to find the way back."""

    counts_E: Tensor  # int64 on the device of the rows: rows of each local expert, in order


class TokenDispatcher(Protocol):
    """``num_local_experts`` experts live here, from the global index ``first_local_expert`` on.

    Experts must keep their output in the graph even when they receive no row: the backward of a
    dispatcher that crosses ranks is a collective as well.
    """

    num_local_experts: int
    first_local_expert: int

    def dispatch(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """``(x_RD, weights_R, routing)``: rows sorted by local expert, in a fixed order of tokens within one.

        ``experts_NK`` are global indices (int64). Differentiable in ``x_ND`` and ``weights_NK``.
        """
        ...

    def combine(self, y_RD: Tensor, routing: Routing) -> Tensor:
        """``y_ND``: the sum over the K rows of each token, in the order of k."""
        ...


@runtime_checkable
class SpreadsExperts(Protocol):
    """A module whose experts can be spread over ranks. As built it holds all of them."""

    num_experts: int
    num_local_experts: int

    def use_dispatcher(self, dispatcher: TokenDispatcher) -> None:
        """Keep only the experts that live here according to ``dispatcher``, and send tokens through it."""
        ...


class LocalDispatcher:
    """All experts live on this rank. Needs no host synchronisation: R = N * K is known beforehand."""

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts
        self.first_local_expert = 0

    def dispatch(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, Routing]:
        rows = RowOrder.by_expert(experts_NK)
        x_RD, weights_R = rows.spread(x_ND, weights_NK)
        return x_RD, weights_R, _LocalRouting(rows.counts(self.num_local_experts), rows)

    def combine(self, y_RD: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, _LocalRouting), "a routing belongs to the dispatcher that made it"
        return routing.rows.collect(y_RD)


class AllToAllDispatcher:
    """Rank r of ``group`` holds the experts ``[r * num_local_experts, (r + 1) * num_local_experts)``.

    All ranks of the group call ``dispatch`` and ``combine`` equally often, with any number of
    tokens, none included. ``dispatch`` makes the host wait once for the device.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        if num_experts % group.size():
            raise ConfigurationError(
                f"{num_experts} experts cannot be spread evenly over {group.size()} ranks; "
                "expert_parallel_size must divide the number of routed experts"
            )
        self.num_local_experts = num_experts // group.size()
        self.first_local_expert = group.rank() * self.num_local_experts
        self._group = group

    def dispatch(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, Routing]:
        num_ranks = self._group.size()
        rows = RowOrder.by_expert(experts_NK)
        leaving_SE = rows.counts(num_ranks * self.num_local_experts).view(num_ranks, -1)
        grad = torch.is_grad_enabled()
        wants = grad and x_ND.requires_grad, grad and weights_NK.requires_grad
        arriving_SE, crossing, wanted = agree(leaving_SE, self._group, wants)
        x_RD, weights_R = cross(crossing, wanted, *rows.spread(x_ND, weights_NK))
        order_R = _by_expert(arriving_SE, len(x_RD))
        inverse_R = invert(order_R)
        routing = _CrossRouting(arriving_SE.sum(0), rows, crossing, order_R, inverse_R, any(wanted))
        return permute_rows(x_RD, order_R, inverse_R), permute_rows(weights_R, order_R, inverse_R), routing

    def combine(self, y_RD: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, _CrossRouting), "a routing belongs to the dispatcher that made it"
        assert y_RD.requires_grad or not routing.wanted, "experts without rows must keep their output in the graph"
        y_RD = permute_rows(y_RD, routing.inverse_R, routing.order_R)
        (y_RD,) = cross(routing.crossing.back(), (y_RD.requires_grad,), y_RD)
        return routing.rows.collect(y_RD)


@dataclass(frozen=True, slots=True, eq=False)
class _LocalRouting(Routing):
    rows: RowOrder


@dataclass(frozen=True, slots=True, eq=False)
class _CrossRouting(Routing):
    rows: RowOrder  # here, before they leave
    crossing: Crossing
    order_R: Tensor  # row by (expert, source rank) -> row by (source rank, expert)
    inverse_R: Tensor
    wanted: bool  # some rank wants gradients


def _by_expert(counts_SE: Tensor, num_rows: int) -> Tensor:
    num_ranks, num_experts = counts_SE.shape
    experts = torch.arange(num_experts, device=counts_SE.device).repeat(num_ranks)
    expert_R = experts.repeat_interleave(counts_SE.flatten(), output_size=num_rows)
    return expert_R.argsort(stable=True)
