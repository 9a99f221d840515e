"""The microbatches that pass one stage, handed out in order.

A schedule's program is a list of turns: it says whose turn it is, not whether there is a microbatch
for it. So a method of a lane returns a step of one action, or the empty step, and a program for any
number of microbatches is one for enough of them, without its empty steps. Steps add up to pairs:
``early.forward() + late.backward()`` is a pair, what is left of one, or nothing.

Where a lane has more turns than microbatches its *first* turns stay empty. The last ones would do
too, but the ends of the programs are where weight gradients wait for the bubbles, and keeping them
makes a short run up to a fifth shorter.
"""

from collections.abc import Iterable, Iterator

from lightning_dualpipe.schedules.action import Action, Kind, Placement, Schedule, Step

__all__ = ["Lane", "schedule_of", "weight_of"]


class Lane:
    """One stage and the microbatches that pass it, each handed out once forward and once backward.

    ``turns`` is how often the program asks for each, at least once per microbatch.
    """

    def __init__(self, stage: int, microbatches: range, turns: int | None = None) -> None:
        self.stage = stage
        num_empty = 0 if turns is None else turns - len(microbatches)
        order = [None] * num_empty + list(microbatches)
        self._forwards, self._backwards = iter(order), iter(order)

    def forward(self) -> Step:
        return self._next(self._forwards, Kind.FORWARD)

    def backward(self) -> Step:
        return self._next(self._backwards, Kind.BACKWARD)

    def backward_input(self) -> Step:
        return self._next(self._backwards, Kind.BACKWARD_INPUT)

    def _next(self, microbatches: Iterator[int | None], kind: Kind) -> Step:
        microbatch = next(microbatches)
        return () if microbatch is None else (Action(self.stage, kind, microbatch),)


def weight_of(backward_input: Step) -> Step:
    """The weight gradient that a step of ``Lane.backward_input`` left to do."""
    return tuple(Action(action.stage, Kind.BACKWARD_WEIGHT, action.microbatch) for action in backward_input)


def schedule_of(name: str, num_microbatches: int, placement: Placement, programs: Iterable[Iterable[Step]]) -> Schedule:
    """A schedule from one program per rank, empty steps dropped."""
    steps = tuple(tuple(step for step in program if step) for program in programs)
    return Schedule(name, num_microbatches, placement, steps)
