"""Who wants to know what a step does, and when.

    engine ── begin(schedule) ──────────────────────────► observer
    engine ── watch(action) ──► stage: with watch(work, phases): compute, launch, or wait

Usually that is ``NOBODY``, who keeps no time. A ``Recorder`` notes the time at either end of every
piece: on CPUs when the host passes, because there it is the host that computes; on GPUs by an event in the
stream that does the work, so that nothing waits for anything, and times are read when all is over. A GPU
that waits for tokens shows it as the time between two neighbouring events of its compute stream.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from lightning_dualpipe.interface import Layer, Phase
from lightning_dualpipe.schedules import Action, Schedule
from lightning_dualpipe.schedules.record import Slice, Work

__all__ = ["NOBODY", "Observer", "Recorder", "Watch", "unwatched"]

Watch = Callable[[Work, Sequence[Phase]], AbstractContextManager[None]]
"""Around a piece of one action: what kind of work it is, and which phases of the model it runs, if any."""


class Observer(Protocol):
    def begin(self, schedule: Schedule) -> None:
        """A training step starts."""
        ...

    def watch(self, action: Action) -> Watch:
        """For the pieces of this action."""
        ...


_NOTHING: AbstractContextManager[None] = nullcontext()


def unwatched(work: Work, phases: Sequence[Phase]) -> AbstractContextManager[None]:
    return _NOTHING


class _Nobody:
    def begin(self, schedule: Schedule) -> None:
        pass

    def watch(self, action: Action) -> Watch:
        return unwatched


NOBODY: Observer = _Nobody()


class Recorder:
    """Records one step of this rank.

    Args:
        layers: the layers of the stages here, for their names.
        align: returns on all ranks at once; from there on each counts its own time, so that clocks of
            several hosts need not agree.
    """

    def __init__(self, device: torch.device, layers: Iterable[Layer], align: Callable[[], None]) -> None:
        self.schedule: Schedule | None = None
        """What the step runs; None as long as there was none."""
        self._clock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
        self._names = {id(phase): f"{layer.name} {phase.name}" for layer in layers for phase in layer.phases}
        self._align = align
        self._seen: list[_Seen] = []

    def begin(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._clock.settle()
        self._align()
        self._clock.start()

    def watch(self, action: Action) -> Watch:
        return partial(self._watched, action)

    @contextmanager
    def _watched(self, action: Action, work: Work, phases: Sequence[Phase]) -> Generator[None, None, None]:
        start = self._clock.now()
        yield
        self._seen.append(_Seen(action, work, phases, start, self._clock.now()))

    def slices(self) -> tuple[Slice, ...]:
        """In order of their beginning. Waits for the device."""
        self._clock.settle()
        seconds = self._clock.seconds
        found = (
            Slice(action, work, self._named(phases), seconds(start), seconds(end))
            for action, work, phases, start, end in self._seen
        )
        return tuple(sorted(found, key=lambda piece: piece.start))

    def _named(self, phases: Sequence[Phase]) -> str:
        names = [self._names[id(phase)] for phase in phases]
        return " … ".join(names if len(names) < 3 else [names[0], names[-1]])


class _Seen(NamedTuple):
    action: Action
    work: Work
    phases: Sequence[Phase]
    start: Any  # of the clock's
    end: Any


class _HostClock:
    """Seconds since ``start``."""

    def __init__(self) -> None:
        self._zero = 0.0

    def settle(self) -> None:
        pass

    def start(self) -> None:
        self._zero = perf_counter()

    def now(self) -> float:
        return perf_counter()

    def seconds(self, when: float) -> float:
        return when - self._zero


class _DeviceClock:
    """The same in the streams of a GPU: ``now`` is when the current stream gets there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero = torch.cuda.Event(enable_timing=True)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def start(self) -> None:
        self._zero.record(torch.cuda.current_stream(self._device))

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, when: torch.cuda.Event) -> float:
        return self._zero.elapsed_time(when) / 1e3
