"""Cut a row of costs into stages of equal cost.

The slowest stage sets the pace of a pipeline, so the cut minimises the cost of the most expensive one.
"""

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["balanced_bounds"]


def balanced_bounds(costs: Sequence[float], num_parts: int) -> list[int]:
    """Boundaries of the contiguous parts whose dearest is cheapest, by dynamic programming.

    ``best[stop]`` after round ``k`` is the cost of the dearest of ``k`` parts that end at ``stop``.
    """
    total = [0.0, *accumulate(costs)]
    best = [0.0] + [float("inf")] * len(costs)
    choices: list[list[int]] = []
    for part in range(1, num_parts + 1):
        found = [
            min(
                ((max(best[start], total[stop] - total[start]), start) for start in range(part - 1, stop)),
                default=(float("inf"), 0),
            )
            for stop in range(len(costs) + 1)
        ]
        best = [cost for cost, _ in found]
        choices.append([start for _, start in found])
    bounds = [len(costs)]
    for choice in reversed(choices):
        bounds.append(choice[bounds[-1]])
    return bounds[::-1]
