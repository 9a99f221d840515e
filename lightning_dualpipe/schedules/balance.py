"""Cut a row of costs into stages, so that no rank has much more to do than the others.

The slowest rank sets the pace of a pipeline. Where a rank has one stage, the dearest stage is to be as
cheap as possible. In a DualPipe or a V it has a stage and its mirror image, and computes one beside
the other: then the dearest such pair is, and how its layers are shared out between the two matters less.

    costs       0 1 1 1 1 1 1 4
    stages      0 1 1 │ 1 1 │ 1 1   │ 4        pairs: 6 of the outer two, 4 of the inner
    mirrored    0 1   │ 1 1 │ 1 1 1 │ 4               5                   5
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

__all__ = ["balanced_bounds"]

_ROUNDING = 1 + 1e-9
_Level = dict[tuple[int, int], tuple[float, int, int]]  # bounds of what is left -> worth, and bounds a pair before


def balanced_bounds(costs: Sequence[float], num_parts: int, *, mirrored: bool = False) -> list[int]:
    """Boundaries of contiguous parts, none of them empty.

    Args:
        mirrored: part ``i`` counts together with part ``num_parts - 1 - i``, and ``num_parts`` is even. Of
            all cuts whose dearest pair is cheapest, the one with the least sum of squares of parts.
    """
    total = [0.0, *accumulate(costs)]
    return _pair_bounds(total, num_parts // 2) if mirrored else _single_bounds(total, num_parts)


def _single_bounds(total: list[float], num_parts: int) -> list[int]:
    """The dearest part is cheapest.

    ``best[stop]`` after round ``k`` is the cost of the dearest of ``k`` parts that end at ``stop``.
    """
    best = [0.0] + [float("inf")] * (len(total) - 1)
    choices: list[list[int]] = []
    for part in range(1, num_parts + 1):
        found = [
            min(
                ((max(best[start], total[stop] - total[start]), start) for start in range(part - 1, stop)),
                default=(float("inf"), 0),
            )
            for stop in range(len(total))
        ]
        best = [cost for cost, _ in found]
        choices.append([start for _, start in found])
    bounds = [len(total) - 1]
    for choice in reversed(choices):
        bounds.append(choice[bounds[-1]])
    return bounds[::-1]


def _pair_bounds(total: list[float], num_pairs: int) -> list[int]:
    """First how cheap the dearest pair can be, then the evenest cut in which it is.

    A search is the quicker the less a pair may cost, so it begins at what none can be below, and gives way.
    """
    least = max(total[-1] / num_pairs, *(after - before for before, after in pairwise(total)))
    found, slack = None, 1 / 64
    while found is None:
        found, slack = _from_both_ends(total, num_pairs, least * (1 + slack), _dearest, _as_is), 2 * slack
    cap = found[0] * _ROUNDING  # sums of the same layers differ by rounding, and are equal
    evenest = _from_both_ends(total, num_pairs, cap, _squares, _squares)
    assert evenest is not None, "what has been found is still there"
    return evenest[1]


def _dearest(before: float, left: float, right: float = 0.0) -> float:
    return max(before, left + right)


def _as_is(before: float, left: float) -> float:
    return before


def _squares(before: float, left: float, right: float = 0.0) -> float:
    return before + left * left + right * right


def _from_both_ends(
    total: list[float],
    num_pairs: int,
    cap: float,
    worth: Callable[[float, float, float], float],
    at_least: Callable[[float, float], float],
) -> tuple[float, list[int]] | None:
    """The cut with pairs of at most ``cap`` that is worth least, from the outermost pair inwards.

        ├─ left ─┤ … what other pairs have … ├─ right ─┤
      start      end                        begin     stop

    Args:
        worth: of the pairs so far, and one more.
        at_least: the same without knowing its right part; what is not less than another with a smaller
            left part is not looked at again.
    """
    levels: list[_Level] = [{(0, len(total) - 1): (0.0, 0, 0)}]
    for inside in reversed(range(num_pairs)):
        by_stop: dict[int, dict[int, float]] = {}
        for (start, stop), (value, _, _) in levels[-1].items():
            by_stop.setdefault(stop, {})[start] = value
        level: _Level = {}
        for stop, starts in by_stop.items():
            for end in range(min(starts) + 1, stop - 2 * inside):
                front: list[tuple[float, float, int]] = []  # left parts, growing, and only if worth it
                lowest = float("inf")
                for start in range(end - 1, -1, -1):
                    left = total[end] - total[start]
                    if left > cap:
                        break
                    if start in starts and (bound := at_least(starts[start], left)) < lowest:
                        lowest = bound
                        front.append((left, starts[start], start))
                if not front:
                    continue
                # the pairs inside may cost as much each, and no more
                room = bisect_right(total, total[end] + inside * cap * _ROUNDING) - 1
                last = min(stop - 1, room) if inside else end
                for begin in range(last, end + 2 * inside - 1, -1):
                    right = total[stop] - total[begin]
                    if front[0][0] + right > cap:
                        break
                    value, start = min(
                        (worth(v, left, right), start) for left, v, start in front if left + right <= cap
                    )
                    if (end, begin) not in level or value < level[end, begin][0]:
                        level[end, begin] = (value, start, stop)
        levels.append(level)
    return _walk_back(levels)


def _walk_back(levels: list[_Level]) -> tuple[float, list[int]] | None:
    if not levels[-1]:
        return None
    middle = min(levels[-1], key=lambda place: (levels[-1][place][0], place))
    worth, (end, begin) = levels[-1][middle][0], middle
    bounds = [end]
    for level in reversed(levels[1:]):
        _, end, begin = level[end, begin]
        bounds = [end, *bounds, begin]
    return worth, bounds
