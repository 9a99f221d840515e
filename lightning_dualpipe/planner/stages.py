"""Which layers a stage has: the cut that ``pipeline.partition`` makes, from sizes alone.

The slowest stage sets the pace of a pipeline, so the cut minimises the cost of the most expensive stage.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from lightning_dualpipe.planner.model import LayerShape, ModelShape

__all__ = ["cut", "num_pieces"]


def num_pieces(model: ModelShape) -> int:
    """The most stages there can be."""
    return sum(not layer.with_previous for layer in model.layers)


@cache
def cut(model: ModelShape, num_stages: int) -> tuple[tuple[LayerShape, ...], ...]:
    """The layers of each stage: contiguous, none empty, the dearest as cheap as possible."""
    starts = [index for index, layer in enumerate(model.layers) if not layer.with_previous]
    pieces = [model.layers[start:stop] for start, stop in pairwise([*starts, len(model.layers)])]
    assert len(pieces) >= num_stages, f"{len(pieces)} pieces make no {num_stages} stages"
    bounds = _balanced_bounds([sum(layer.cost for layer in piece) for piece in pieces], num_stages)
    return tuple(tuple(layer for piece in pieces[start:stop] for layer in piece) for start, stop in pairwise(bounds))


def _balanced_bounds(costs: Sequence[float], num_parts: int) -> list[int]:
    """By dynamic programming: ``best[stop]`` after round ``k`` is the dearest of ``k`` parts that end at ``stop``."""
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
