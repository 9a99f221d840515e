"""The two classic pipelines on a line of ranks, as baselines: GPipe and 1F1B.

GPipe (arXiv:1811.06965, figure 2c) computes all forwards, then all backwards, so a rank holds every
microbatch at once. 1F1B (PipeDream-Flush, arXiv:2006.09503) starts a backward as soon as one is
there: the same bubble, (P - 1)(F + B), but rank ``r`` of ``P`` holds at most ``P - r`` microbatches.
"""

from collections.abc import Iterator

from lightning_dualpipe.schedules.action import Action, Kind, Placement, Schedule, Step
from lightning_dualpipe.schedules.lane import Lane, schedule_of

__all__ = ["gpipe", "one_f_one_b"]


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, the last microbatch first, whose activations are the freshest."""

    def program(rank: int) -> Iterator[Step]:
        for microbatch in range(num_microbatches):
            yield (Action(rank, Kind.FORWARD, microbatch),)
        for microbatch in reversed(range(num_microbatches)):
            yield (Action(rank, Kind.BACKWARD, microbatch),)

    return schedule_of("gpipe", num_microbatches, Placement.line(num_ranks), map(program, range(num_ranks)))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Warm up, then one forward and one backward in turn, then drain."""

    def program(rank: int) -> Iterator[Step]:
        lane = Lane(rank, range(num_microbatches))
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        for _ in range(warmup):
            yield lane.forward()
        for _ in range(num_microbatches - warmup):
            yield lane.forward()
            yield lane.backward()
        for _ in range(warmup):
            yield lane.backward()

    return schedule_of("1f1b", num_microbatches, Placement.line(num_ranks), map(program, range(num_ranks)))
