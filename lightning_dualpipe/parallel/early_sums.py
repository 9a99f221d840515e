"""Sum gradients over their holders while the schedule still runs, and hand them over with ``backward``.

    rank 0   … 3B7 3W6 3W7 │ 0B6   0B7   0W6   0W7 │       stage 3 is done: its gradients will not change,
                           └─ sums of stage 3 ─────┴─      they travel while stage 0 computes

A unit is what becomes final together and has the same holders. Every rank starts its units in one
order of all units of the world, the last stage's first: that is the order in which backwards end,
in both directions of a bidirectional pipeline alike, so nobody waits for long; and with one order
no two ranks wait for each other, whatever a backend does one after the other.

There are two ways, and all ranks choose the same one, since it follows from the calls alone:

    early   the gradients of a schedule are summed as above; backward adds sums to ``.grad``
    late    backward adds what this rank has to ``.grad``, and the total is summed after the last one: while
            Lightning blocks the synchronisation for accumulated batches, that costs one sum instead of many

A sum S can be added late as well, as S / n on each of its n holders.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dualpipe.parallel.buckets import start_sums
from lightning_dualpipe.parallel.replicas import ReplicaGroups

__all__ = ["EarlySums", "GradientSums", "Step"]


class GradientSums:
    """Decides between early and late, for one model on this rank.

    Args:
        named: this rank's parameters by the names that ``replicas`` knows.
        stages_of: by name, all stages of the model that use the parameter.
        here: the stages on this rank.
    """

    def __init__(
        self,
        replicas: ReplicaGroups,
        named: Callable[[], Mapping[str, nn.Parameter]],
        stages_of: Mapping[str, Sequence[int]],
        here: Collection[int],
    ) -> None:
        self.blocked = False
        """Whether another backward follows before the gradients are needed."""
        self._replicas, self._named = replicas, named
        self._stages_of, self._here = stages_of, here
        self._pending = False  # ``.grad`` has, or had, what is not summed yet
        self._unsummed: set[str] = set()  # of which parameters; some may be frozen by now (``toggle_optimizer``)
        self._late: weakref.WeakSet[Step] = weakref.WeakSet()  # whose gradients have not been handed over
        self._hands_over_sums = True
        self._backward = -1

    def begin(self) -> Step:
        """Before a schedule that computes gradients."""
        if self.blocked or self._pending:
            step = Step(self, None)
            self._late.add(step)
            return step
        return Step(self, EarlySums(self._replicas, self._named(), self._stages_of, self._here))

    def hand_over(self, step: Step, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Within a backward: what it adds to ``.grad``, of the gradients of a step. At its end they are sums."""
        self._join_backward()
        self._late.discard(step)
        if step.sums is None:
            return gradients
        absent = step.sums.wait()
        gradients = {name: gradient for name, gradient in gradients.items() if name not in absent}
        if not self._hands_over_sums:
            for name, gradient in gradients.items():
                gradient /= self._replicas.num_holders(name)
        return gradients

    def _join_backward(self) -> None:
        """Whoever calls it, Lightning, ``manual_backward`` or ``loss.backward()``; it may hand over several steps."""
        backward: int = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        self._backward = backward
        self._hands_over_sums = not (self.blocked or self._pending or self._late)
        if not self._hands_over_sums:
            self._replicas.unsum(self._named())
        # what DDP and FSDP use: there is no public way to learn of the end of a backward
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """Before anybody can look at the gradients. They stay this rank's part while ``blocked``."""
        if self._hands_over_sums:
            self._replicas.note_summed(self._named())
            return
        named = self._named()
        self._unsummed |= {name for name, parameter in named.items() if parameter.requires_grad}
        self._pending = self.blocked
        if not self.blocked:
            self._replicas.sum_gradients(named, frozen=self._unsummed)
            self._unsummed = set()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Step:
    """The gradients of one schedule, on their way."""

    _owner: GradientSums
    sums: EarlySums | None
    gradients: dict[str, Tensor] | None = None

    def stage_done(self, stage: int) -> None:
        if self.sums is not None:
            self.sums.stage_done(stage)

    def take(self) -> dict[str, Tensor] | None:
        """Once, by name; then None."""
        gradients, self.gradients = self.gradients, None
        return None if gradients is None else self._owner.hand_over(self, gradients)


class _Unit(NamedTuple):
    stages: frozenset[int]  # of this rank
    names: list[str]
    group: dist.ProcessGroup


class EarlySums:
    """The sums of one schedule's gradients."""

    def __init__(
        self,
        replicas: ReplicaGroups,
        named: Mapping[str, nn.Parameter],
        stages_of: Mapping[str, Sequence[int]],
        here: Iterable[int],
    ) -> None:
        self._replicas, self._named = replicas, named
        self._here, self._done = frozenset(here), set[int]()
        self._waiting = deque(self._units(stages_of))
        self._under_way: list[dist.Work] = []
        self._missing: list[tuple[str, Tensor]] = []  # here; with whether any holder has it

    def stage_done(self, stage: int) -> None:
        """No gradient of ``stage`` changes on this rank any more. Said again, it changes nothing."""
        self._done.add(stage)
        while self._waiting and self._waiting[0].stages <= self._done:
            self._start(self._waiting.popleft())

    def wait(self) -> set[str]:
        """Until the sums are there. Returns the names of which no holder has a gradient."""
        assert not self._waiting, "every stage is done before gradients are handed over"
        for work in self._under_way:
            work.wait()
        self._under_way = []
        return {name for name, present in self._missing if not present}

    def _units(self, stages_of: Mapping[str, Sequence[int]]) -> Iterator[_Unit]:
        trained = {name: parameter for name, parameter in self._named.items() if parameter.requires_grad}
        found = []
        for order, (group, names) in enumerate(self._replicas.by_group(trained)):
            by_stages: dict[tuple[int, ...], list[str]] = {}
            for name in names:
                by_stages.setdefault(tuple(sorted(stages_of[name])), []).append(name)
            for stages, members in by_stages.items():
                found.append((-stages[0], stages, order, _Unit(self._here & set(stages), members, group)))
        for *_, unit in sorted(found, key=lambda each: each[:3]):
            yield unit

    @torch.no_grad()
    def _start(self, unit: _Unit) -> None:
        parameters = [self._named[name] for name in unit.names]
        self._replicas.refuse_sparse({name: self._named[name] for name in unit.names})
        present = torch.ones(len(parameters), device=parameters[0].device)
        for index, (name, parameter) in enumerate(zip(unit.names, parameters, strict=True)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
                present[index] = 0
                self._missing.append((name, present[index]))
        work = dist.all_reduce(present, group=unit.group, async_op=True)
        assert work is not None, "this rank belongs to the group"
        self._under_way += [work, *start_sums(parameters, unit.group, self._replicas.bucket_bytes)]
