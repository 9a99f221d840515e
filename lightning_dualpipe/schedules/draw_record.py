"""A recorded step as a table and as a picture: every rank's measured lanes above its simulated one.

    rank 0   measured   │0│1│   │0 0 0│1│      pieces of actions; below them, thinner, where it launches or waits
             simulated  │0│1│ │0 0 │1│         the same steps with the measured medians, and nothing in between

Colours are those of ``schedules.draw``.
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dualpipe.errors import MissingPackageError
from lightning_dualpipe.schedules.action import Action, Kind
from lightning_dualpipe.schedules.palette import COLOURS, FAINT, IDLE, INK, NAMES, shade
from lightning_dualpipe.schedules.record import RankRecord, RankTimes, Slice, StepRecord, Work
from lightning_dualpipe.schedules.simulate import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_record", "record_table"]


def record_table(record: StepRecord) -> str:
    """Milliseconds by rank, and of the two sums also the simulation's."""
    heads = ["rank", "stages", "computing", "(simulated)", "bubble", "(simulated)", "exposed", "(simulated)"]
    heads += ["launches", "tokens", "messages"]
    rows = []
    for index, (rank, times) in enumerate(zip(record.ranks, record.times(), strict=True)):
        stages = ",".join(map(str, record.schedule.stages_on(rank.pipeline_rank)))
        seconds = (
            times.computing,
            times.simulated_computing,
            times.bubble,
            times.simulated_bubble,
            times.exposed,
            times.simulated_exposed,
            *(rank.spent(work) for work in (Work.LAUNCH, Work.TOKENS, Work.MESSAGE)),
        )
        rows.append([str(index), stages, *(f"{1e3 * value:.1f}" for value in seconds)])
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join(
        [
            _title(record),
            "",
            "milliseconds",
            *lines,
            "",
            "bubble     the time of the step in which a rank does not compute",
            "exposed    the part of the bubble in which it launches a communication, or waits for one",
            "tokens, messages    waits for tokens of experts, and for another stage's results",
            "simulated  the same schedule with the medians of computing, and no communication",
            "",
        ]
    )


def _title(record: StepRecord) -> str:
    schedule, ideal, shares = record.schedule, record.simulated(), record.shares()
    return (
        f"{schedule.name}, {schedule.num_ranks} pipeline ranks, {schedule.num_microbatches} microbatches: "
        f"{1e3 * record.duration:.1f} ms (simulated {1e3 * ideal.duration:.1f}), "
        f"bubble {shares['bubble']:.1%} (simulated {shares['simulated_bubble']:.1%}), "
        f"exposed communication {shares['exposed_communication']:.1%}"
    )


_WAITS = {Work.LAUNCH: "#8c6bb1", Work.TOKENS: "#d9534f", Work.MESSAGE: "#b9b4aa"}
# Of the height of a rank: where a lane begins, and how high it is.
_MEASURED, _COMMUNICATION, _SIMULATED = (0.06, 0.40), (0.46, 0.10), (0.62, 0.30)
_RANK = 0.78  # inches
_WIDTH, _MARGINS = 12.0, (1.15, 1.25, 0.60, 0.75)  # inches: the grid; left, right, top, bottom
_LEAST = 1 / 2000  # of the step: shorter pieces are not seen, only rendered


def draw_record(record: StepRecord, path: str | PathLike[str]) -> Path:
    """Write the picture in the format of the suffix of ``path``.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            'a picture needs matplotlib: pip install "lightning-dualpipe[draw]"; table and trace need nothing'
        ) from error
    left, right, top, bottom = _MARGINS
    height = _RANK * len(record.ranks)
    figure = Figure(figsize=(left + _WIDTH + right, top + height + bottom), dpi=110)
    width, whole = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / whole, _WIDTH / width, height / whole))
    duration, ideal = record.duration or 1.0, record.simulated()
    axes.set_xlim(0, 1e3 * max(duration, ideal.duration))
    for index, rank in enumerate(record.ranks):
        _draw_measured(axes, record, index, rank)
        _box(axes, index, _SIMULATED, 0.0, ideal.duration, IDLE)
        _draw_simulated(axes, record, index, ideal.spans[rank.pipeline_rank])
    _draw_frame(axes, record, ideal)
    _draw_legend(axes, record)
    figure.savefig(path)
    return Path(path)


def _draw_measured(axes: "Axes", record: StepRecord, index: int, rank: RankRecord) -> None:
    _box(axes, index, _MEASURED, 0.0, record.duration, IDLE)
    _box(axes, index, _COMMUNICATION, 0.0, record.duration, IDLE)
    for piece in _visible(rank.slices, record.duration * _LEAST):
        if piece.work.computes:
            colour = _colour(record, piece.action, weights=piece.work is Work.WEIGHTS)
            _box(axes, index, _MEASURED, piece.start, piece.end, colour, label=str(piece.action.microbatch))
        else:
            _box(axes, index, _COMMUNICATION, piece.start, piece.end, _WAITS[piece.work])


def _visible(slices: Iterable[Slice], least: float) -> Iterable[Slice]:
    return (piece for piece in slices if piece.seconds >= least)


def _draw_simulated(axes: "Axes", record: StepRecord, index: int, spans: Iterable[Span]) -> None:
    low, high = _SIMULATED
    for step, start, end in spans:
        height = high / len(step)
        for part, action in enumerate(step):
            lane = (low + part * height, height)
            _box(axes, index, lane, start, end, _colour(record, action), label=str(action.microbatch))


def _colour(record: StepRecord, action: Action, *, weights: bool = False) -> str:
    """Weight gradients have their colour also where they are part of a whole backward."""
    return COLOURS[Kind.BACKWARD_WEIGHT if weights else action.kind][shade(record.schedule, action)]


def _box(
    axes: "Axes", index: int, lane: tuple[float, float], start: float, end: float, colour: str, *, label: str = ""
) -> None:
    """From ``start`` to ``end``, in seconds, in a lane of the rank in row ``index``."""
    from matplotlib.patches import Rectangle

    low, height = lane
    start, end = 1e3 * start, 1e3 * end
    box = Rectangle((start, index + low), end - start, height, facecolor=colour, linewidth=0.4, edgecolor="white")
    axes.add_patch(box)
    inches = (end - start) / axes.get_xlim()[1] * _WIDTH
    points = 72 * min(0.13, 0.7 * height * _RANK, inches / (0.75 * len(label))) if label else 0
    if points >= 4:  # smaller is not read
        middle = ((start + end) / 2, index + low + height * 0.52)
        axes.annotate(label, middle, ha="center", va="center_baseline", fontsize=points, color=INK)


def _draw_frame(axes: "Axes", record: StepRecord, ideal: Timeline) -> None:
    """Title, names of ranks and lanes, time, and each rank's figures at its right end."""
    axes.set_ylim(len(record.ranks), 0)
    axes.set_yticks([])
    axes.set_xlabel("milliseconds", fontsize=8, color=FAINT)
    axes.tick_params(axis="x", length=2, color=FAINT, labelsize=8, labelcolor=FAINT)
    axes.spines[:].set_visible(False)
    name, figures = _title(record).split(": ", 1)
    _note(axes, name, (0, 1), (0, 12), fontsize=11, weight="bold", color=INK)
    _note(axes, figures, (1, 1), (0, 12), ha="right", fontsize=9, color=FAINT)
    for index, times in enumerate(record.times()):

        def beside(text: str, side: int, lane: tuple[float, float], row: int = index, **style: Any) -> None:
            height = 1 - (row + lane[0] + lane[1] / 2) / len(record.ranks)
            _note(axes, text, (side, height), (12 * side - 6, 0), va="center", ha=("right", "left")[side], **style)

        beside(f"rank {index}", 0, (0.06, 0.50), fontsize=9, weight="bold", color=INK)
        beside("simulated", 0, _SIMULATED, fontsize=8, color=FAINT)
        bubble, exposed, promised = _figures(times, record.duration, ideal.duration)
        beside(bubble, 1, (0.06, 0.24), fontsize=8, color=INK)
        beside(exposed, 1, (0.30, 0.24), fontsize=8, color=INK)
        beside(promised, 1, _SIMULATED, fontsize=8, color=FAINT)


def _note(axes: "Axes", text: str, place: tuple[float, float], offset: tuple[int, int], **style: Any) -> None:
    """Text so many points off a place, which is a share of the grid."""
    axes.annotate(text, place, offset, xycoords="axes fraction", textcoords="offset points", **style)


def _figures(times: RankTimes, duration: float, simulated: float) -> tuple[str, str, str]:
    return (
        f"bubble {times.bubble / (duration or 1.0):.0%}",
        f"exposed {times.exposed / (duration or 1.0):.0%}",
        f"bubble {times.simulated_bubble / (simulated or 1.0):.0%}",
    )


def _draw_legend(axes: "Axes", record: StepRecord) -> None:
    from matplotlib.patches import Patch

    slices = [piece for rank in record.ranks for piece in rank.slices]
    kinds = {Kind.BACKWARD_WEIGHT if p.work is Work.WEIGHTS else p.action.kind for p in slices if p.work.computes}
    entries = [(NAMES[kind], COLOURS[kind][0]) for kind in Kind if kind in kinds]
    entries += [(str(work), colour) for work, colour in _WAITS.items() if any(p.work is work for p in slices)]
    axes.legend(
        [Patch(facecolor=colour) for _, colour in entries],
        [name for name, _ in entries],
        loc="upper left",
        bbox_to_anchor=(0, -0.42 / (_RANK * len(record.ranks))),
        borderaxespad=0,
        ncols=len(entries),
        fontsize=8,
        labelcolor=INK,
        frameon=False,
        handlelength=1.6,
    )
