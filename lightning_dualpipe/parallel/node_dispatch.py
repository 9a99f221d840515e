"""A token crosses the network between nodes once for each node, however many of its experts live there.

    node 0     rank 0   rank 1            a token of rank 1, for experts of ranks 2 and 3:
                          ║ across        one copy to the rank of that node with the sender's own place,
    node 1     rank 2 ◄─ rank 3           and from there one to each rank that holds experts of it
                    within                (technical report, section 3.2.2)

The way home is the same in the other direction, with sums: an expert's rank sums the rows of a copy, the
forwarding rank the copies of its node, and only these sums cross. Where all ranks share a node, or each has
one of its own, there is one hop, with one copy per rank.

    dispatch   spread ══across══► spread ══within══►                each the other's backward
    combine    collect ◄══across══ collect ◄══within══

All ranks tell each other how many copies will take which hop before the first leaves, so the host waits once
and no hop waits for it.

Shapes: N tokens, K experts chosen per token, C copies, S ranks of the expert group: A nodes of W ranks, E local
experts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.interface import Flight, Values
from lightning_dualpipe.parallel.all_to_all import Crossing, RowFlight
from lightning_dualpipe.parallel.copies import Copies, Places, place_of
from lightning_dualpipe.parallel.dispatch import Routing, experts_per_rank
from lightning_dualpipe.parallel.flight import used_here
from lightning_dualpipe.parallel.relay import Relay
from lightning_dualpipe.parallel.row_format import sent_in, with_gradients_in
from lightning_dualpipe.parallel.token_copies import CopyDispatcher, CopyRouting, Landed
from lightning_dualpipe.parallel.traffic import Traffic

__all__ = ["NodeDispatcher", "NodeRoutes"]


@dataclass(slots=True, eq=False)
class NodeRoutes:
    """The ways of one expert group, for the dispatchers of all layers.

    Ranks of ``group`` lie node by node. ``across`` are those with this rank's place in their node, ``within``
    those of its node; each is None where that is this rank alone. With one hop it may be ``group`` itself.
    """

    group: dist.ProcessGroup
    across: dist.ProcessGroup | None
    within: dist.ProcessGroup | None
    relay: Relay = field(default_factory=Relay)

    @property
    def num_nodes(self) -> int:
        return 1 if self.across is None else self.across.size()

    @property
    def num_within(self) -> int:
        return 1 if self.within is None else self.within.size()


class NodeDispatcher(CopyDispatcher):
    """Rank r of the group holds the experts ``[r * num_local_experts, (r + 1) * num_local_experts)``.

    All ranks of the group take the same steps equally often, with any number of tokens, none included.

    ``traffic`` is what its dispatches have sent from here so far.
    """

    def __init__(self, num_experts: int, routes: NodeRoutes) -> None:
        self.num_local_experts = experts_per_rank(num_experts, routes.group)
        self.first_local_expert = routes.group.rank() * self.num_local_experts
        self.traffic = Traffic()
        self._routes = routes

    def send(self, rows: Tensor, weights: Tensor, plan: Tensor) -> Flight:
        return sent_in(self.row_format, rows, lambda written: self._depart(written, weights, plan))

    def send_back(self, rows: Tensor, routing: Routing) -> Flight:
        assert isinstance(routing, CopyRouting)
        return with_gradients_in(self.row_format, _Combine(routing.journey.home((rows,)), routing))

    def _depart(self, rows: Tensor, weights: Tensor, plan: Tensor) -> Flight:
        """``rows`` as they travel."""
        routes = self._routes
        counts = _Counts.agree(plan.div(self.num_local_experts, rounding_mode="floor"), routes)
        state, weight = (tensor.shape[1] * tensor.element_size() for tensor in (rows, weights))
        experts = plan.to(torch.int32)
        copy_bytes = state + weight + experts.shape[1] * experts.element_size()
        self.traffic += counts.traffic(copy_bytes=copy_bytes, row_bytes=state + weights.element_size())
        hops = [
            _Hop(crossing, first, per_place)
            for crossing, first, per_place in (
                (counts.across(), 0, routes.num_within * self.num_local_experts),
                (counts.within(), counts.node * routes.num_within * self.num_local_experts, self.num_local_experts),
            )
            if crossing is not None
        ]
        journey = _Journey(hops, routes.relay, (rows, weights, experts))
        return _Dispatch(journey, self.first_local_expert, counts)


@dataclass(slots=True, eq=False)
class _Hop:
    """Its copies are known once the experts of the rows have come here."""

    crossing: Crossing
    first_expert: int
    experts_per_place: int
    copies: Copies | None = None

    def spread(self, tensors: Values) -> Values:
        if self.copies is None:
            *_, experts_RK = tensors
            peers = len(self.crossing.sent)
            place_RK = place_of(experts_RK, first=self.first_expert, per_place=self.experts_per_place, num_places=peers)
            self.copies = Places.of(place_RK, peers).copies(sum(self.crossing.sent))
        return tuple(self.copies.spread(tensor) for tensor in tensors)

    def collect(self, tensors: Values) -> Values:
        assert self.copies is not None, "nothing comes home that was not sent"
        used_here(self.copies.row_C, self.copies.position_RJ)
        return tuple(self.copies.collect(tensor) for tensor in tensors)


class _Journey:
    """Tensors on their way through all hops, outward or home."""

    def __init__(self, hops: Sequence[_Hop], relay: Relay, tensors: Values, *, outward: bool = True) -> None:
        self._hops, self._relay = hops, relay
        self._leaving = tensors  # must live until they have left
        self._outward = outward
        self._last_hop: Future[RowFlight] | RowFlight
        if len(hops) > 1 and tensors[0].device.type == "cpu":
            self._last_hop = relay.start(self._travel)
        else:
            self._last_hop = self._travel()

    def land(self) -> Values:
        flight = self._last_hop if isinstance(self._last_hop, RowFlight) else self._last_hop.result()
        landed = flight.land()
        self._leaving = ()
        return landed if self._outward else self._hops[0].collect(landed)

    def home(self, tensors: Values) -> _Journey:
        return _Journey(self._hops, self._relay, tensors, outward=False)

    def out(self, tensors: Values) -> _Journey:
        """Again, the way that is known by now."""
        return _Journey(self._hops, self._relay, tensors)

    def _travel(self) -> RowFlight:
        """Launch all hops, and wait for all but the last."""
        tensors = self._leaving
        if self._outward:
            *before, last = self._hops
            for hop in before:
                tensors = hop.crossing.launch(*hop.spread(tensors)).land()
            return last.crossing.launch(*last.spread(tensors))
        first, *behind = self._hops
        for hop in reversed(behind):
            tensors = hop.collect(hop.crossing.reversed().launch(*tensors).land())
        return first.crossing.reversed().launch(*tensors)


@dataclass(slots=True, eq=False)
class _Dispatch:
    journey: _Journey
    first_local_expert: int
    counts: _Counts

    def land(self) -> Values:
        x_CD, weights_CK, experts_CK = self.journey.land()
        local_CK = experts_CK.to(torch.int64) - self.first_local_expert
        sources = self.counts.sources(len(x_CD))
        return x_CD, weights_CK, Landed(local_CK, sources, self.counts.num_ranks, self.counts.num_rows, self.journey)

    def back(self, gradients: Values) -> Flight:
        return _Combine(self.journey.home(gradients[:2]), None)


@dataclass(slots=True, eq=False)
class _Combine:
    """Also the backward of a dispatch."""

    journey: _Journey
    routing: Routing | None

    def land(self) -> Values:
        return *self.journey.land(), self.routing

    def back(self, gradients: Values) -> Flight:
        return _Combine(self.journey.out(gradients[:1]), None)


class _Counts:
    """How many rows take which hop. Row s of ``leaving`` is what this rank told rank s, of ``told`` what that told it:

    copies to the node of the one who is told │ rows for its experts │ copies to each rank of its node
    """

    def __init__(self, routes: NodeRoutes, leaving: list[list[int]], told: Tensor, heard: list[list[int]]) -> None:
        self._routes, self._leaving, self._told, self._heard = routes, leaving, told, heard
        self.num_ranks = routes.group.size()
        self.node, self._place = divmod(routes.group.rank(), routes.num_within)
        self.num_rows = sum(rows for _, rows, *_ in heard)

    @classmethod
    def agree(cls, rank_NK: Tensor, routes: NodeRoutes) -> _Counts:
        """Makes the host wait, once."""
        num_ranks, nodes, within = routes.group.size(), routes.num_nodes, routes.num_within
        rows_S = torch.zeros(num_ranks, dtype=torch.int64, device=rank_NK.device)
        rows_S.scatter_add_(0, rank_NK.flatten(), torch.ones_like(rank_NK).flatten())
        wanted_NS = torch.zeros(len(rank_NK), num_ranks, dtype=torch.bool, device=rank_NK.device)
        wanted_NAW = wanted_NS.scatter_(1, rank_NK, True).unflatten(1, (nodes, within))
        to_node_A11 = wanted_NAW.any(2).sum(0).view(nodes, 1, 1).expand(-1, within, -1)
        to_ranks_AWW = wanted_NAW.sum(0).unsqueeze(1).expand(-1, within, -1)
        leaving = torch.cat([to_node_A11, rows_S.view(nodes, within, 1), to_ranks_AWW], dim=2).flatten(0, 1)
        told = torch.empty_like(leaving)
        dist.all_to_all_single(told, leaving.contiguous(), group=routes.group)
        return cls(routes, leaving.tolist(), told, told.tolist())

    def across(self) -> Crossing | None:
        group, within = self._routes.across, self._routes.num_within
        if group is None:
            return None
        sent = [counts[0] for counts in self._leaving[self._place :: within]]
        return Crossing(group, sent=sent, received=[counts[0] for counts in self._heard[self._place :: within]])

    def within(self) -> Crossing | None:
        group, within = self._routes.within, self._routes.num_within
        if group is None:
            return None
        forwarded = self._heard[self._place :: within]  # first hops end at ranks with the sender's place
        return Crossing(
            group,
            sent=[sum(counts[2 + peer] for counts in forwarded) for peer in range(within)],
            received=[sum(counts[2 + self._place] for counts in self._heard[peer::within]) for peer in range(within)],
        )

    def sources(self, num_copies: int) -> Tensor:
        """The rank that each copy came from: they lie by forwarding rank, then by node."""
        used_here(self._told)
        shape = (self._routes.num_nodes, self._routes.num_within)
        copies_S = self._told[:, 2 + self._place].view(shape).t().flatten()
        rank_S = torch.arange(self.num_ranks, device=self._told.device).view(shape).t().flatten()
        return rank_S.repeat_interleave(copies_S, output_size=num_copies)

    def traffic(self, *, copy_bytes: int, row_bytes: int) -> Traffic:
        within, here = self._routes.num_within, self._routes.group.rank()
        away = [counts for rank, counts in enumerate(self._leaving) if rank // within != self.node]
        copies = sum(counts[0] for counts in away) // within  # each rank of a node was told
        rows = sum(counts[1] for counts in away)
        return Traffic(
            across_nodes=copies,
            within_nodes=self._forwarded_from_here(),
            rows_across_nodes=rows,
            bytes_across_nodes=copies * copy_bytes,
            bytes_of_rows_across_nodes=rows * row_bytes,
            rows_within_nodes=sum(
                counts[1] for rank, counts in enumerate(self._leaving) if rank // within == self.node and rank != here
            ),
        )

    def _forwarded_from_here(self) -> int:
        crossing = self.within()
        return 0 if crossing is None else sum(crossing.sent) - crossing.sent[self._place]
