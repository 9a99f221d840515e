"""ZB1P: 1F1B whose weight gradients wait until there is nothing better to do.

The handcrafted ZB-H1 of Zero Bubble Pipeline Parallelism (arXiv:2401.10241, section 2.3). The stage
before waits for input gradients only, so each backward is split, and on rank ``r`` of ``P`` weight
gradients lag ``r`` microbatches behind. All ranks then hold ``P`` microbatches, what 1F1B's rank 0
holds anyway, and the waits while draining are filled: the bubble shrinks from (P - 1)(F + B) to
(P - 1)(F + B - 2W), where F + B - 2W = F + I - W.
"""

from collections import deque
from collections.abc import Iterator

from lightning_dualpipe.schedules.action import Placement, Schedule, Step
from lightning_dualpipe.schedules.lane import Lane, schedule_of, weight_of

__all__ = ["zb1p"]


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """Stage ``r`` on rank ``r``, every backward split in two."""

    def program(rank: int) -> Iterator[Step]:
        lane = Lane(rank, range(num_microbatches))
        waiting: deque[Step] = deque()  # weight gradients split off, not computed yet

        def split_backward() -> Step:
            step = lane.backward_input()
            waiting.append(weight_of(step))
            return step

        warmup = min(num_ranks - 1 - rank, num_microbatches)
        for _ in range(warmup):
            yield lane.forward()
        for _ in range(num_microbatches - warmup):
            yield lane.forward()
            yield split_backward()
            if len(waiting) > rank:
                yield waiting.popleft()
        for _ in range(warmup):  # between two gradients from the next rank there is time for one of the waiting
            yield split_backward()
            yield waiting.popleft()
        yield from waiting

    return schedule_of("zb1p", num_microbatches, Placement.line(num_ranks), map(program, range(num_ranks)))
