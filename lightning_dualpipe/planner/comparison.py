"""Schedules side by side, on equal stages and equal devices: what the schedule buys, and what overlap does.

from lightning_dualpipe.planner import DEEPSEEK, side_by_side
for row in side_by_side(DEEPSEEK.times, layers_per_rank=4, pipeline=16, num_microbatches=120):
    print(row)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dualpipe.planner.overlap import pair, stage_times
from lightning_dualpipe.planner.step import held_microbatches, pipeline_seconds
from lightning_dualpipe.planner.times import LayerTimes

__all__ = ["Row", "side_by_side"]


@dataclass(frozen=True, slots=True)
class Row:
    schedule: str
    overlap: bool
    seconds: float
    speedup: float  # over the first row
    held: float  # microbatches whose activations a rank keeps, in units of all its layers

    def __str__(self) -> str:
        name = self.schedule + ("" if self.overlap else ", nothing overlapped")
        return f"{name:31} {self.seconds:7.2f} s   x{self.speedup:.2f}   holds {self.held:g}"


def side_by_side(
    layer: LayerTimes, *, layers_per_rank: int, pipeline: int, num_microbatches: int, hide_alone: bool = False
) -> tuple[Row, ...]:
    """1F1B, ZB1P, and both DualPipes with and without overlap; messages between stages take no time.

    Args:
        layers_per_rank: an even number, as DualPipeV halves them.
        hide_alone: whether lone backwards hide their all-to-alls behind weight gradients, which 1F1B as it is
            commonly found cannot: it computes input and weight gradients together.
    """
    found: list[tuple[str, bool, float, float]] = []
    for schedule, overlap in _ROWS:
        parts = 2 if schedule == "dualpipev" else 1
        layers = [layer] * (layers_per_rank // parts)
        alone = stage_times(layers, hide_alone=hide_alone)
        both = pair(layers, layers) if overlap else alone.forward + alone.backward
        stages = [alone] * (parts * pipeline)
        seconds = pipeline_seconds(schedule, num_microbatches, stages, [both] * pipeline, 0.0)
        found.append((schedule, overlap, seconds, _most(schedule, num_microbatches, parts * pipeline) / parts))
    first = found[0][2]
    return tuple(Row(name, overlap, seconds, first / seconds, held) for name, overlap, seconds, held in found)


_ROWS: Sequence[tuple[str, bool]] = (
    *(("1f1b", False), ("zb1p", False), ("dualpipe", False), ("dualpipe", True)),
    *(("dualpipev", False), ("dualpipev", True)),
)


def _most(schedule: str, num_microbatches: int, num_stages: int) -> int:
    """Of all stages of the rank that holds most: with two stages a rank, those of a stage and its mirror image."""
    held = held_microbatches(schedule, num_microbatches, num_stages)
    return held[0] + held[-1] if schedule in ("dualpipe", "dualpipev") else max(held)
