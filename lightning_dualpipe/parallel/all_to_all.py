"""All-to-all of rows with uneven counts, as a flight: launched here, waited for where the rows are needed.

    counts_SE ──agree──► Crossing: how many rows go to and come from each rank
                            │ launch(x_RD, weights_R)           rows leave, sorted by destination
                            ▼
                         RowFlight ── land() ──► rows that came, sorted by source
                            │ back(gradients)                   the same way in the other direction
                            ▼
                         RowFlight ── land() ──► gradients of the rows that left

Every rank takes part in every crossing and in its way back, with no row at all if need be: a rank
that left out a collective would keep the others waiting for ever.

Shapes: S ranks of the group, E experts of each, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.interface import Values
from lightning_dualpipe.parallel.flight import used_here

__all__ = ["Crossing", "RowFlight", "agree"]


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """How many rows go to and come from each rank of the group."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    def reversed(self) -> Crossing:
        return Crossing(self.group, sent=self.received, received=self.sent)

    def launch(self, *tensors: Tensor, beside: Sequence[Any] = ()) -> RowFlight:
        """Send the rows of each tensor; ``beside`` does not travel and is handed out where they land."""
        leaving = tuple(tensor.contiguous() for tensor in tensors)
        arriving = tuple(x.new_empty(sum(self.received), *x.shape[1:]) for x in leaving)
        works = [self._start(out, x) for out, x in zip(arriving, leaving, strict=True)]
        return RowFlight(self, tuple(beside), len(tensors), (*tensors, *leaving), arriving, works)

    def _start(self, out: Tensor, x: Tensor) -> dist.Work:
        work = dist.all_to_all_single(out, x, self.received, self.sent, group=self.group, async_op=True)
        assert work is not None, "this rank belongs to the group"
        return work


@dataclass(slots=True, eq=False)
class RowFlight:
    """An ``interface.Flight``. ``beside`` follows the tensors that land, and has no gradient."""

    crossing: Crossing
    beside: Values
    num_tensors: int
    _leaving: tuple[Tensor, ...]  # must live until they have left, and what they are copies of until they are copied
    _arriving: tuple[Tensor, ...]
    _works: list[dist.Work] = field(repr=False)

    def land(self) -> Values:
        for work in self._works:
            work.wait()
        landed = self._arriving
        used_here(*self._leaving, *landed)  # this stream has waited for the copies, the one they were made on has not
        self._leaving, self._arriving, self._works = (), (), []
        return *landed, *self.beside

    def back(self, gradients: Values) -> RowFlight:
        nothing = (None,) * len(self.beside)
        return self.crossing.reversed().launch(*gradients[: self.num_tensors], beside=nothing)


def agree(counts_SE: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Crossing]:
    """Tell rank s of the group that ``counts_SE[s]`` rows are coming, by its experts.

    Returns the counts that the others tell us, in the same form, and the crossing. Makes the host wait
    for the counts: buffers need their sizes.
    """
    told_SE = torch.empty_like(counts_SE)
    dist.all_to_all_single(told_SE, counts_SE.contiguous(), group=group)
    sent, received = torch.stack([counts_SE, told_SE]).sum(-1).tolist()
    return told_SE, Crossing(group, sent=sent, received=received)
