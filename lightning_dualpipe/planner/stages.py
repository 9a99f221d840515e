"""Which layers a stage has: the cut that ``pipeline.partition`` makes, from sizes alone."""

from functools import cache
from itertools import pairwise

from lightning_dualpipe.planner.model import LayerShape, ModelShape
from lightning_dualpipe.schedules.balance import balanced_bounds

__all__ = ["cut", "num_pieces"]


def num_pieces(model: ModelShape) -> int:
    """The most stages there can be."""
    return sum(not layer.with_previous for layer in model.layers)


@cache
def cut(model: ModelShape, num_stages: int, *, mirrored: bool = False) -> tuple[tuple[LayerShape, ...], ...]:
    """The layers of each stage: contiguous, none empty, and what the busiest rank has as cheap as possible."""
    starts = [index for index, layer in enumerate(model.layers) if not layer.with_previous]
    pieces = [model.layers[start:stop] for start, stop in pairwise([*starts, len(model.layers)])]
    assert len(pieces) >= num_stages, f"{len(pieces)} pieces make no {num_stages} stages"
    costs = [sum(layer.cost for layer in piece) for piece in pieces]
    bounds = balanced_bounds(costs, num_stages, mirrored=mirrored)
    return tuple(tuple(layer for piece in pieces[start:stop] for layer in piece) for start, stop in pairwise(bounds))
