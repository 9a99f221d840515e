"""A schedule on paper: when each step runs, how long each rank idles, how much it must hold.

A rank runs its steps in order, each as soon as the inputs exist; a result of another rank exists
``send`` after it was computed, and sending keeps nobody busy. This is the ideal that an engine is
measured against, and it reproduces the published bubbles (of P ranks; B = I + W):

    1F1B        (P - 1)(F + B)
    ZB1P        (P - 1)(F + B - 2W)            where W <= F and W <= I
    DualPipe    (P/2 - 1)(F&B + B - 3W)        where F = I and W <= I; P/2 is P for DualPipeV's half stages
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import NamedTuple

from lightning_dualpipe.errors import ConfigurationError, DeadlockError
from lightning_dualpipe.schedules.action import Action, Kind, Schedule, Step, format_step

__all__ = ["Costs", "Span", "Timeline", "simulate"]

Cost = float | tuple[float, ...]
"""The same for all stages, or one number per stage."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations in any unit.

    ``overlapped`` is a forward and a backward of one stage run together; a pair of two stages takes
    the mean of theirs, and None means that overlapping gains nothing. ``backward`` is a whole backward
    on its own; None means the sum of its two parts, it may be less where one hides the other's
    communication. ``send`` is the time from the end of a step until another rank has its result.
    """

    forward: Cost = 1.0
    backward_input: Cost = 1.0
    backward_weight: Cost = 1.0
    overlapped: Cost | None = None
    send: float = 0.0
    backward: Cost | None = None

    def of(self, step: Step) -> float:
        """How long a step takes."""
        if len(step) == 2 and self.overlapped is not None:
            return sum(_at(self.overlapped, action.stage) for action in step) / 2
        return sum(self._alone(action) for action in step)

    def _alone(self, action: Action) -> float:
        match action.kind:
            case Kind.FORWARD:
                return _at(self.forward, action.stage)
            case Kind.BACKWARD if self.backward is not None:
                return _at(self.backward, action.stage)
            case Kind.BACKWARD:
                return _at(self.backward_input, action.stage) + _at(self.backward_weight, action.stage)
            case Kind.BACKWARD_INPUT:
                return _at(self.backward_input, action.stage)
            case Kind.BACKWARD_WEIGHT:
                return _at(self.backward_weight, action.stage)

    def check(self, num_stages: int) -> None:
        """Raise ConfigurationError where a cost is negative or does not have one number per stage."""
        problems = []
        for name in ("forward", "backward_input", "backward_weight", "overlapped", "send", "backward"):
            cost = getattr(self, name)
            values = cost if isinstance(cost, tuple) else () if cost is None else (cost,)
            if isinstance(cost, tuple) and len(cost) != num_stages:
                problems.append(f"{name} has {len(cost)} numbers, the schedule {num_stages} stages; give one per stage")
            if not all(0 <= value < float("inf") for value in values):
                problems.append(f"{name}={cost}: a duration is finite and at least 0")
        if problems:
            raise ConfigurationError.of("these costs fit no schedule", problems)


def _at(cost: Cost, stage: int) -> float:
    return cost[stage] if isinstance(cost, tuple) else cost


class Span(NamedTuple):
    """A step and when it runs."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a schedule's steps run; everything is indexed by rank."""

    spans: tuple[tuple[Span, ...], ...]
    duration: float  # from the first start to the last end
    idle: tuple[float, ...]  # duration less the time of the rank's own steps
    peak: tuple[int, ...]  # the most microbatches, counted per stage, that wait for their weight gradient at once

    @property
    def idle_share(self) -> float:
        """Idle time of all ranks / time of all ranks."""
        return sum(self.idle) / (self.duration * len(self.idle)) if self.duration else 0.0


def simulate(schedule: Schedule, costs: Costs = Costs()) -> Timeline:
    """Run a schedule on paper. Raises DeadlockError naming who waits for what."""
    costs.check(schedule.num_stages)
    spans = _run(schedule, costs)
    duration = max((steps[-1].end for steps in spans if steps), default=0.0)
    idle = (duration - sum(span.end - span.start for span in steps) for steps in spans)
    return Timeline(tuple(map(tuple, spans)), duration, tuple(idle), _peaks(schedule))


def _run(schedule: Schedule, costs: Costs) -> list[list[Span]]:
    """Each rank goes as far as it can; one that lacks an input is woken when it exists."""
    finished: dict[Action, tuple[float, int]] = {}  # output -> when, on which rank
    asleep: dict[int, Action] = {}  # rank -> the output it waits for
    sleepers: defaultdict[Action, list[int]] = defaultdict(list)  # the same, the other way round
    spans: list[list[Span]] = [[] for _ in schedule.steps]
    awake = deque(range(len(schedule.steps)))
    while awake:
        rank = awake.popleft()
        steps, done = schedule.steps[rank], spans[rank]
        while len(done) < len(steps):
            step = steps[len(done)]
            inputs = [output for action in step for output in action.inputs(schedule.num_stages)]
            missing = next((output for output in inputs if output not in finished), None)
            if missing is not None:
                asleep[rank] = missing
                sleepers[missing].append(rank)
                break
            start = done[-1].end if done else 0.0
            for when, where in map(finished.__getitem__, inputs):
                start = max(start, when if where == rank else when + costs.send)
            end = start + costs.of(step)
            done.append(Span(step, start, end))
            for output in filter(None, (action.output for action in step)):
                finished[output] = (end, rank)
                for sleeper in sleepers.pop(output, ()):
                    del asleep[sleeper]
                    awake.append(sleeper)
    if asleep:
        waits = (
            f"  rank {rank} cannot run {format_step(schedule.steps[rank][len(spans[rank])])}: waits for {missing} of "
            f"rank {schedule.rank_of(missing.stage, missing.microbatch)}"
            for rank, missing in sorted(asleep.items())
        )
        raise DeadlockError(f"schedule {schedule.name} stops before its end:\n" + "\n".join(waits))
    return spans


def _peaks(schedule: Schedule) -> tuple[int, ...]:
    """In a pair the forward's activations exist beside those the backward is about to free."""
    if not schedule.has_backward:
        return (0,) * schedule.num_ranks
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_INPUT: 0, Kind.BACKWARD_WEIGHT: -1}
    peaks = []
    for steps in schedule.steps:
        held = peak = 0
        for action in (action for step in steps for action in step):
            held += change[action.kind]
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)
