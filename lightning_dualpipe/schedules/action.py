"""The vocabulary of schedules: what each rank computes, and in what order.

A schedule is a value. For every rank it lists *steps*; a step is one *action*, or a forward and a
backward that overlap; an action computes one microbatch on one stage:

    3F7        stage 3, forward of microbatch 7
    0F3+3B5    stage 0's forward of microbatch 3 together with stage 3's backward of microbatch 5

A backward is one action B, or two: I, the gradient of the input, which the stage before waits for,
and later W, the gradient of the weights, for which nobody waits (zero bubble, arXiv:2401.10241).

Directions are no part of an action. A *route* lists the rank of every stage; where there are two
routes, the first half of the microbatches takes the first and the rest the second:

    dualpipe     routes 0 1 2 3 and 3 2 1 0: every stage has two replicas
    dualpipev    route 0 1 2 3 3 2 1 0
    others       route 0 1 2 3

Schedules only compute. ``exchange`` derives the sends and receives, ``check`` says whether a
schedule keeps the rules, ``simulate`` when everything happens.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from lightning_dualpipe.errors import ScheduleError

__all__ = ["Action", "Kind", "Placement", "Schedule", "Step", "format_step", "parse_step"]


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"  # input and weight gradients together
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"

    __hash__ = str.__hash__  # Enum's own is Python code; actions are keys of every dictionary here


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One unit of compute. Prints as ``3F7``: stage 3, forward, microbatch 7."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text, re.ASCII)
        if match is None:
            raise ScheduleError(f"{text!r} is no action; an action is stage, F, B, I or W, and microbatch, as in 3F7")
        return cls(int(match[1]), Kind(match[2]), int(match[3]))

    @property
    def output(self) -> "Action | None":
        """The name of what others consume: ``3F7`` the activation, ``3B7`` the input gradient (of B or I)."""
        match self.kind:
            case Kind.FORWARD | Kind.BACKWARD:
                return self
            case Kind.BACKWARD_INPUT:
                return Action(self.stage, Kind.BACKWARD, self.microbatch)
            case Kind.BACKWARD_WEIGHT:
                return None

    def inputs(self, num_stages: int) -> "tuple[Action, ...]":
        """The outputs this action consumes. The first stage's forward needs none."""
        stage, microbatch = self.stage, self.microbatch
        if self.kind is Kind.FORWARD:
            return (Action(stage - 1, Kind.FORWARD, microbatch),) if stage else ()
        if self.kind is Kind.BACKWARD_WEIGHT:
            return (Action(stage, Kind.BACKWARD, microbatch),)
        own = Action(stage, Kind.FORWARD, microbatch)
        return (own,) if stage == num_stages - 1 else (own, Action(stage + 1, Kind.BACKWARD, microbatch))


Step = tuple[Action, ...]
"""One action, or a forward and a full backward that overlap, in this order."""


def format_step(step: Step) -> str:
    return "+".join(map(str, step))


def parse_step(text: str) -> Step:
    return tuple(map(Action.parse, text.split("+")))


@dataclass(frozen=True, slots=True)
class Placement:
    """Which ranks serve which stages. A route is the rank of every stage, in order of stages."""

    routes: tuple[tuple[int, ...], ...]

    @classmethod
    def line(cls, num_ranks: int) -> "Placement":
        """Stage ``s`` on rank ``s``."""
        return cls((tuple(range(num_ranks)),))

    @classmethod
    def v(cls, num_ranks: int) -> "Placement":
        """Two stages a rank: down to the last rank and back, so that rank 0 has the first and the last stage."""
        down = tuple(range(num_ranks))
        return cls((down + down[::-1],))

    @classmethod
    def bidirectional(cls, num_ranks: int) -> "Placement":
        """Every stage twice: one route to the right, one to the left."""
        right = tuple(range(num_ranks))
        return cls((right, right[::-1]))

    @property
    def num_stages(self) -> int:
        return len(self.routes[0])

    @property
    def num_ranks(self) -> int:
        return 1 + max(map(max, self.routes))

    @property
    def is_mirrored(self) -> bool:
        """Whether a rank has two stages, one as far from the beginning as the other from the end."""
        return self.num_stages > 1 and self.stages_on(0) == (0, self.num_stages - 1)

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages a rank may serve, ascending, whether or not a microbatch comes by."""
        return tuple(sorted({stage for route in self.routes for stage, place in enumerate(route) if place == rank}))

    def replicas_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of a stage, ascending."""
        return tuple(sorted({route[stage] for route in self.routes}))


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every rank computes for ``num_microbatches`` microbatches. ``steps[rank]`` is a rank's program.

    ``str(schedule)`` and ``Schedule.parse`` are each other's inverse.
    """

    name: str
    num_microbatches: int
    placement: Placement
    steps: tuple[tuple[Step, ...], ...] = field(repr=False, hash=False)  # hashing thousands of actions is not free

    @property
    def num_ranks(self) -> int:
        return self.placement.num_ranks

    @property
    def num_stages(self) -> int:
        return self.placement.num_stages

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that computes this microbatch on this stage."""
        return self.placement.routes[self.direction_of(microbatch)][stage]

    def direction_of(self, microbatch: int) -> int:
        """Which route a microbatch takes. Of an odd number of microbatches, the first route gets one more."""
        return microbatch * len(self.placement.routes) // self.num_microbatches

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages a rank may serve, ascending, whether or not a microbatch comes by."""
        return self.placement.stages_on(rank)

    def replicas_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of a stage, ascending."""
        return self.placement.replicas_of(stage)

    @property
    def has_backward(self) -> bool:
        return any(action.kind is not Kind.FORWARD for steps in self.steps for step in steps for action in step)

    def forward_only(self) -> "Schedule":
        """The forwards alone, in the same order: for validation and prediction."""

        def forwards(steps: Iterable[Step]) -> tuple[Step, ...]:
            kept = (tuple(action for action in step if action.kind is Kind.FORWARD) for step in steps)
            return tuple(step for step in kept if step)

        return replace(self, name=f"{self.name}-forward", steps=tuple(map(forwards, self.steps)))

    def __str__(self) -> str:
        lines = [f"schedule {self.name} of {self.num_microbatches} microbatches"]
        lines += [f"route {' '.join(map(str, route))}" for route in self.placement.routes]
        lines += [f"rank {rank}: {' '.join(map(format_step, steps))}" for rank, steps in enumerate(self.steps)]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Read what ``str`` writes. Only the form is checked; ``check`` knows whether the schedule is sound."""
        heads = re.findall(r"^schedule (.+) of (\d+) microbatches$", text, re.MULTILINE)
        routes = re.findall(r"^route (\d+(?: \d+)*)$", text, re.MULTILINE)
        ranks = re.findall(r"^rank (\d+):(.*)$", text, re.MULTILINE)
        num_lines = sum(bool(line.strip()) for line in text.splitlines())
        in_order = [int(rank) for rank, _ in ranks] == list(range(len(ranks)))
        if len(heads) != 1 or not routes or not in_order or 1 + len(routes) + len(ranks) != num_lines:
            raise ScheduleError(
                "a schedule is a line 'schedule NAME of N microbatches', lines 'route 0 1 2 …' with the rank of every "
                f"stage, and lines 'rank 0: 0F0 0F1 …' from rank 0 up; got:\n{text}"
            )
        placement = Placement(tuple(tuple(map(int, route.split())) for route in routes))
        steps = tuple(tuple(map(parse_step, program.split())) for _, program in ranks)
        return cls(heads[0][0], int(heads[0][1]), placement, steps)
