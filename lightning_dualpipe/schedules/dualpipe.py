"""DualPipe (DeepSeek-V3, arXiv:2412.19437, section 3.2.1) and DualPipeV, its half.

DualPipe feeds microbatches from both ends of the line of ranks. In the steady state every rank then
has a forward and a backward at hand that do not need each other: it runs the two at once, and the
communication of one hides behind the computation of the other. The price: every stage exists twice.

    DualPipe      rank 0   1   2   3           DualPipeV     rank 0   1
    first half         0 → 1 → 2 → 3 stage     way down           0 → 1  stage
    second half        3 ← 2 ← 1 ← 0                                  ↓
                                               way up             3 ← 2

What the left half of the ranks sends over the middle it gets back from the right half, which does
the same mirrored, as if its own microbatches turned round there. DualPipeV keeps one half and lets
them turn round: no stage exists twice, but each rank has two, and they can be half the size.

So both are one program for the ranks of a V, in eight steps, told by three numbers: how far the rank
is from the tips of the V (``depth``), how many ranks lie between it and the fold (``above``), and how
many turns each lane gets (``turns``; at least twice the ranks of the V, or the steps do not fit).
"""

from collections import deque
from collections.abc import Iterator

from lightning_dualpipe.schedules.action import Placement, Schedule, Step
from lightning_dualpipe.schedules.lane import Lane, schedule_of, weight_of

__all__ = ["dualpipe", "dualpipev"]


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """The bidirectional pipeline: the first half of the microbatches flows right, the rest left.

    Rank ``r`` serves stages ``r`` and ``num_ranks - 1 - r``. The number of ranks is even.
    """
    assert num_ranks % 2 == 0, f"dualpipe mirrors one half of the ranks onto the other, so not {num_ranks} of them"
    num_right = (num_microbatches + 1) // 2
    turns = max(num_right, num_ranks)

    def program(rank: int) -> Iterator[Step]:
        mirror = num_ranks - 1 - rank
        right = Lane(rank, range(num_right), turns)
        left = Lane(mirror, range(num_right, num_microbatches), turns)
        early, late = (right, left) if rank < mirror else (left, right)
        return _half_program(early, late, above=num_ranks // 2 - 1 - early.stage, turns=turns)

    return schedule_of("dualpipe", num_microbatches, Placement.bidirectional(num_ranks), map(program, range(num_ranks)))


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """One half of a DualPipe of twice the ranks: rank ``r`` serves stages ``r`` and ``2 * num_ranks - 1 - r``."""
    num_stages = 2 * num_ranks
    turns = max(num_microbatches, num_stages)

    def program(rank: int) -> Iterator[Step]:
        early, late = (Lane(stage, range(num_microbatches), turns) for stage in (rank, num_stages - 1 - rank))
        return _half_program(early, late, above=num_ranks - 1 - rank, turns=turns)

    return schedule_of("dualpipev", num_microbatches, Placement.v(num_ranks), map(program, range(num_ranks)))


def _half_program(early: Lane, late: Lane, *, above: int, turns: int) -> Iterator[Step]:
    """What one rank of a V computes.

    ``early`` is the stage it serves on the way down the V, ``late`` the one on the way up, and
    ``above`` counts the ranks between it and the fold, where the two lanes meet.
    """
    depth = early.stage + 1
    waiting: deque[Step] = deque()  # weight gradients split off, not computed yet

    def split_backward(lane: Lane) -> Step:
        step = lane.backward_input()
        waiting.append(weight_of(step))
        return step

    for _ in range(2 * above):  # 1. fill the way down
        yield early.forward()
    for _ in range(depth):  # 2. fill both ways
        yield early.forward()
        yield late.forward()
    for _ in range(above):  # 3. the first backwards, whose weight gradients fill the bubble
        yield split_backward(late)
        yield waiting.popleft()
        yield late.forward()
    for turn in range(turns - 2 * above - depth):  # 4. steady state: each forward hides a backward
        if turn == 0 and above == 0:  # at the fold the forward would delay a backward that others wait for
            yield early.forward()
            yield late.backward()
        else:
            yield early.forward() + late.backward()
        yield late.forward() + early.backward()
    for _ in range(above):  # 5. the early lane has no forwards left
        yield late.backward()
        yield late.forward() + early.backward()
    for turn in range(2 * depth):  # 6. drain both ways; the second half postpones its weight gradients
        lane = early if turn % 2 else late
        yield split_backward(lane) if turn >= depth else lane.backward()
    for _ in range(above):  # 7. drain the way up
        yield waiting.popleft()
        yield split_backward(early)
    yield from waiting  # 8. the postponed weight gradients
