"""Sending tokens to their experts and bringing the results home.

    x_ND ──pack──► rows ══send══► rows ──unpack──► x_RD, one row per (token, chosen expert), sorted by expert
                                                     │  expert e works on counts_E[e] neighbours, times weights_R
    y_ND ◄─collect─ rows ◄══send_back══ rows ◄─gather─ y_RD       the K rows of each token summed in the order of k

    dispatch = pack, send, unpack        combine = gather, send_back, collect        ══ may cross ranks

The dispatcher is the only seam for expert parallelism in model code. Its steps either compute on this
rank, under autograd, or communicate, as an ``interface.Flight``; a pipeline runs other work while one is
under way. ``LocalDispatcher`` is the definition, a stable sort; ``AllToAllDispatcher`` gives each token
the same bits:

    pack: sort by expert            rows lie in the order of the ranks they go to: a rank holds neighbours
    send: all-to-all                rows lie in the order of the ranks they came from
    unpack: regroup                 rows lie in the order of experts, and of (rank, token) within one

Others send fewer rows and sum in another order: ``node_dispatch``, ``deepep``.

Weights are applied on the expert side, so combine is a plain sum, and dispatch and combine are each
other's backward: what one spreads, the other sums. No token is ever dropped.

Shapes: N tokens, K experts chosen per token, R rows (N * K on one rank), E local experts, S ranks
of the expert group, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Flight, Values
from lightning_dualpipe.parallel.all_to_all import Crossing, agree
from lightning_dualpipe.parallel.flight import fly, used_here
from lightning_dualpipe.parallel.row_format import RowFormat, sent_in, with_gradients_in
from lightning_dualpipe.parallel.rows import RowOrder, invert, permute_rows

__all__ = [
    "AllToAllDispatcher",
    "LocalDispatcher",
    "Routing",
    "SpreadsExperts",
    "TokenDispatcher",
    "experts_per_rank",
]


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Where the rows of one dispatch lie. Dispatchers add what they need to find the way back."""

    counts_E: Tensor  # int64 on the device of the rows: rows of each local expert, in order


class TokenDispatcher(ABC):
    """``num_local_experts`` experts live here, from the global index ``first_local_expert`` on.

    ``plan`` is whatever a dispatcher has to remember between its steps.

    Experts must keep their output in the graph even when they receive no row: the backward of a
    dispatcher that crosses ranks is a collective as well.
    """

    num_local_experts: int
    first_local_expert: int
    crosses_ranks: bool
    """Whether ``send`` and ``send_back`` talk to anybody."""
    row_format: RowFormat | None = None
    """How rows travel in ``send``, and gradients in the backward of ``send_back``; None: as they are.

    They have been rounded to it before.
    """

    @abstractmethod
    def pack(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, Any]:
        """``(rows, weights, plan)``: what ``send`` takes. ``experts_NK`` are global indices (int64)."""

    @abstractmethod
    def send(self, rows: Tensor, weights: Tensor, plan: Any) -> Flight:
        """Lands ``(rows, weights, plan)``, what ``unpack`` takes."""

    @abstractmethod
    def unpack(self, rows: Tensor, weights: Tensor, plan: Any) -> tuple[Tensor, Tensor, Routing]:
        """``(x_RD, weights_R, routing)``: sorted by local expert, in a fixed order of tokens within one."""

    @abstractmethod
    def gather(self, y_RD: Tensor, routing: Routing) -> Tensor:
        """What ``send_back`` takes, of the experts' results."""

    @abstractmethod
    def send_back(self, rows: Tensor, routing: Routing) -> Flight:
        """Lands ``(rows, routing)``, what ``collect`` takes."""

    @abstractmethod
    def collect(self, rows: Tensor, routing: Routing) -> Tensor:
        """``y_ND``: the sum over the K rows of each token, in a fixed order."""

    def dispatch(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """``(x_RD, weights_R, routing)`` of ``unpack``. Differentiable in ``x_ND`` and ``weights_NK``."""
        return self.unpack(*self.sent(*self.pack(x_ND, weights_NK, experts_NK)))

    def combine(self, y_RD: Tensor, routing: Routing) -> Tensor:
        """``y_ND`` of ``collect``. Differentiable in ``y_RD``."""
        return self.collect(*self.sent_back(self.gather(y_RD, routing), routing))

    def sent(self, rows: Tensor, weights: Tensor, plan: Any) -> Values:
        """What lands of ``send``, differentiable."""
        return fly(self.send, rows, weights, plan)

    def sent_back(self, rows: Tensor, routing: Routing) -> Values:
        """What lands of ``send_back``, differentiable."""
        return fly(self.send_back, rows, routing)


@runtime_checkable
class SpreadsExperts(Protocol):
    """A module whose experts can be spread over ranks. As built it holds all of them."""

    num_experts: int
    num_local_experts: int

    def use_dispatcher(self, dispatcher: TokenDispatcher) -> None:
        """Keep only the experts that live here according to ``dispatcher``, and send tokens through it."""
        ...


class LocalDispatcher(TokenDispatcher):
    """All experts live on this rank. Needs no host synchronisation: R = N * K is known beforehand."""

    crosses_ranks = False

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts
        self.first_local_expert = 0

    def pack(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, RowOrder]:
        rows = RowOrder.by_expert(experts_NK)
        return *rows.spread(x_ND, weights_NK), rows

    def send(self, rows: Tensor, weights: Tensor, plan: RowOrder) -> Flight:
        return _Stay((rows, weights, plan))

    def unpack(self, rows: Tensor, weights: Tensor, plan: RowOrder) -> tuple[Tensor, Tensor, Routing]:
        return rows, weights, _LocalRouting(plan.counts(self.num_local_experts), plan)

    def gather(self, y_RD: Tensor, routing: Routing) -> Tensor:
        return y_RD

    def send_back(self, rows: Tensor, routing: Routing) -> Flight:
        return _Stay((rows, routing))

    def collect(self, rows: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, _LocalRouting), "a routing belongs to the dispatcher that made it"
        return routing.rows.collect(rows)

    def sent(self, rows: Tensor, weights: Tensor, plan: RowOrder) -> Values:
        return rows, weights, plan

    def sent_back(self, rows: Tensor, routing: Routing) -> Values:
        return rows, routing


def experts_per_rank(num_experts: int, group: dist.ProcessGroup) -> int:
    """
    Raises:
        ConfigurationError: experts do not divide.
    """
    if num_experts % group.size():
        raise ConfigurationError(
            f"{num_experts} experts cannot be spread evenly over {group.size()} ranks; "
            "expert_parallel_size must divide the number of routed experts"
        )
    return num_experts // group.size()


class AllToAllDispatcher(TokenDispatcher):
    """Rank r of ``group`` holds the experts ``[r * num_local_experts, (r + 1) * num_local_experts)``.

    All ranks of the group take the same steps equally often, with any number of tokens, none included.
    ``send`` makes the host wait for the other ranks' counts of tokens.
    """

    crosses_ranks = True

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_local_experts = experts_per_rank(num_experts, group)
        self.first_local_expert = group.rank() * self.num_local_experts
        self._group = group

    def pack(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor, RowOrder]:
        rows = RowOrder.by_expert(experts_NK)
        return *rows.spread(x_ND, weights_NK), rows

    def send(self, rows: Tensor, weights: Tensor, plan: RowOrder) -> Flight:
        num_ranks = self._group.size()
        leaving_SE = plan.counts(num_ranks * self.num_local_experts).view(num_ranks, -1)
        arriving_SE, crossing = agree(leaving_SE, self._group)
        beside = [_Crossed(plan, crossing, arriving_SE)]
        return sent_in(self.row_format, rows, lambda written: crossing.launch(written, weights, beside=beside))

    def unpack(self, rows: Tensor, weights: Tensor, plan: _Crossed) -> tuple[Tensor, Tensor, Routing]:
        used_here(plan.arriving_SE)  # made where it was sent from, and freed when the host is done with this function
        order_R = _by_expert(plan.arriving_SE, len(rows))
        inverse_R = invert(order_R)
        routing = _CrossRouting(plan.arriving_SE.sum(0), plan.rows, plan.crossing, order_R, inverse_R)
        return permute_rows(rows, order_R, inverse_R), permute_rows(weights, order_R, inverse_R), routing

    def gather(self, y_RD: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, _CrossRouting), "a routing belongs to the dispatcher that made it"
        in_graph = y_RD.requires_grad or not torch.is_grad_enabled()
        assert in_graph, "experts without rows must keep their output in the graph"
        return permute_rows(y_RD, routing.inverse_R, routing.order_R)

    def send_back(self, rows: Tensor, routing: Routing) -> Flight:
        assert isinstance(routing, _CrossRouting)
        return with_gradients_in(self.row_format, routing.crossing.reversed().launch(rows, beside=[routing]))

    def collect(self, rows: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, _CrossRouting)
        return routing.rows.collect(rows)


@dataclass(frozen=True, slots=True, eq=False)
class _LocalRouting(Routing):
    rows: RowOrder


@dataclass(frozen=True, slots=True, eq=False)
class _Crossed:
    """What is known of rows that have arrived and are not sorted yet."""

    rows: RowOrder  # of those that left
    crossing: Crossing
    arriving_SE: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _CrossRouting(Routing):
    rows: RowOrder  # here, before they leave
    crossing: Crossing
    order_R: Tensor  # row by (expert, source rank) -> row by (source rank, expert)
    inverse_R: Tensor


@dataclass(frozen=True, slots=True)
class _Stay:
    """A flight that goes nowhere."""

    values: Values

    def land(self) -> Values:
        return self.values

    def back(self, gradients: Values) -> Flight:
        return _Stay(gradients)


def _by_expert(counts_SE: Tensor, num_rows: int) -> Tensor:
    num_ranks, num_experts = counts_SE.shape
    experts = torch.arange(num_experts, device=counts_SE.device).repeat(num_ranks)
    expert_R = experts.repeat_interleave(counts_SE.flatten(), output_size=num_rows)
    return expert_R.argsort(stable=True)
