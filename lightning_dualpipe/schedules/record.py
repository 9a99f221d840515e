"""One step of a pipeline as it really ran, beside what it should have been.

    rank 0  compute        │F0──│F1──│    │F0+B0 ───────│ …         slices that compute
            communication            │wait│                         slices that launch, or wait
            simulated      │F0─│F1─│  │F0+B0 ──────│ …

    time of the step = computing + bubble             of every rank; a step begins when all ranks are ready
    exposed communication                             the part of the bubble in which a rank launches or waits

A wait for a message is a wait for another rank's result: the schedule's own, which the simulation has
too, or what the network and slower ranks add. The simulation takes the same steps with the medians
that were measured for them, and nothing in between: what it is faster by is the price of engine,
network, and uneven microbatches.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

from lightning_dualpipe.schedules.action import Action, Kind, Schedule, Step
from lightning_dualpipe.schedules.simulate import Costs, Timeline, simulate

__all__ = ["RankRecord", "RankTimes", "Slice", "StepRecord", "Work"]


class Work(StrEnum):
    """What a rank is doing."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHTS = "weight gradients"
    LAUNCH = "launch"
    TOKENS = "wait for tokens"
    MESSAGE = "wait for a message"

    @property
    def computes(self) -> bool:
        return self in (Work.FORWARD, Work.BACKWARD, Work.WEIGHTS)


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of an action. Seconds since the step began."""

    action: Action
    work: Work
    phases: str  # of the model: "blocks.3 attend"
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank of the run did, in order of beginning."""

    pipeline_rank: int
    slices: tuple[Slice, ...]

    @property
    def end(self) -> float:
        return max((piece.end for piece in self.slices), default=0.0)

    @property
    def computing(self) -> float:
        return _covered(piece for piece in self.slices if piece.work.computes)

    @property
    def exposed(self) -> float:
        """On a GPU communication has a lane of its own: what computation covers is not exposed."""
        return _covered(self.slices) - self.computing

    def spent(self, work: Work) -> float:
        return sum(piece.seconds for piece in self.slices if piece.work is work)


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Seconds of one rank in a step, and those of the simulation."""

    computing: float
    bubble: float
    exposed: float
    simulated_computing: float
    simulated_bubble: float
    simulated_exposed: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step of all ranks of the run; ``ranks`` are in order, those of all pipelines."""

    schedule: Schedule
    ranks: tuple[RankRecord, ...]

    @property
    def duration(self) -> float:
        return max((rank.end for rank in self.ranks), default=0.0)

    def simulated(self) -> Timeline:
        """The same schedule with the costs of this step."""
        return simulate(self.schedule, self.costs())

    def times(self) -> list[RankTimes]:
        """Of every rank. In the simulation a rank is exposed while it waits for the result of another."""
        duration, ideal = self.duration, self.simulated()
        found = []
        for rank in self.ranks:
            steps = ideal.spans[rank.pipeline_rank]
            idle = ideal.idle[rank.pipeline_rank]
            tail = ideal.duration - (steps[-1].end if steps else 0.0)
            computing = rank.computing
            found.append(
                RankTimes(
                    computing, duration - computing, rank.exposed, ideal.duration - idle, idle, max(idle - tail, 0.0)
                )
            )
        return found

    def shares(self) -> dict[str, float]:
        """Of the time of all ranks: the bubble, communication that nothing hides, and the bubble of the simulation."""
        times, duration = self.times(), self.duration or 1.0
        return {
            "bubble": fmean(each.bubble for each in times) / duration,
            "exposed_communication": fmean(each.exposed for each in times) / duration,
            "simulated_bubble": self.simulated().idle_share,
        }

    def costs(self) -> Costs:
        """Medians over all ranks and microbatches, by stage; of computing, without waits."""
        samples = _Samples()
        for rank in self.ranks:
            spent: defaultdict[tuple[Action, bool], float] = defaultdict(float)  # whether it is weight gradients
            for piece in rank.slices:
                if piece.work.computes:
                    spent[piece.action, piece.work is Work.WEIGHTS] += piece.seconds
            for step in self.schedule.steps[rank.pipeline_rank]:
                samples.add(step, [(spent[action, False], spent[action, True]) for action in step])
        return samples.costs(self.schedule.num_stages)


class _Samples:
    """What steps took, by stage. Of each stage the lone steps count, and if there are none those in pairs."""

    def __init__(self) -> None:
        self._alone: defaultdict[tuple[Kind, int], list[tuple[float, float]]] = defaultdict(list)
        self._paired: defaultdict[tuple[Kind, int], list[tuple[float, float]]] = defaultdict(list)
        self._pairs: defaultdict[int, list[float]] = defaultdict(list)

    def add(self, step: Step, spent: list[tuple[float, float]]) -> None:
        """``spent`` of each action: seconds without weight gradients that had waited, and on those."""
        for action, each in zip(step, spent, strict=True):
            (self._alone if len(step) == 1 else self._paired)[action.kind, action.stage].append(each)
            if len(step) == 2:
                self._pairs[action.stage].append(sum(map(sum, spent)))

    def costs(self, num_stages: int) -> Costs:
        stages = range(num_stages)
        forward = tuple(sum(self._median(Kind.FORWARD, stage)) for stage in stages)
        inputs, weights = zip(*map(self._backward, stages), strict=True)
        overlapped = tuple(
            median(self._pairs[stage]) if stage in self._pairs else forward[stage] + inputs[stage] + weights[stage]
            for stage in stages
        )
        return Costs(forward, inputs, weights, overlapped if self._pairs else None)

    def _backward(self, stage: int) -> tuple[float, float]:
        """Input and weight gradient: as the schedule splits them, or else as a whole backward does."""
        if (Kind.BACKWARD_INPUT, stage) in self._alone:
            _, weights = self._median(Kind.BACKWARD_WEIGHT, stage)
            return sum(self._median(Kind.BACKWARD_INPUT, stage)), weights
        return self._median(Kind.BACKWARD, stage)

    def _median(self, kind: Kind, stage: int) -> tuple[float, float]:
        found = self._alone.get((kind, stage)) or self._paired.get((kind, stage)) or [(0.0, 0.0)]
        first, second = zip(*found, strict=True)
        return median(first), median(second)


def _covered(slices: Iterable[Slice]) -> float:
    """The time in which at least one of the slices runs."""
    total = until = 0.0
    for piece in sorted(slices, key=lambda piece: piece.start):
        total += max(0.0, piece.end - max(piece.start, until))
        until = max(until, piece.end)
    return total
