"""Schedules over time, as text and as a picture: one row a rank, time to the right.

    rank 0 0F0 0F1 0F2 .   3F4 .   3I4 3W4 3F5 0F3+3B5---- …

The picture follows figure 5 of the DeepSeek-V3 report (arXiv:2412.19437): numbers are microbatches,
colours are kinds of work, the paler shade is the second direction (in a V, the way up), and a dark
frame holds a forward and a backward that overlap.
"""

from collections.abc import Sequence
from math import ceil
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.schedules.action import Action, Kind, Schedule, format_step
from lightning_dualpipe.schedules.palette import COLOURS, FAINT, IDLE, INK, NAMES, shade
from lightning_dualpipe.schedules.simulate import Costs, Span, Timeline, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_picture", "draw_text"]

_LEGEND = (
    "3F7: stage 3, forward, microbatch 7 | B backward | I input gradient | W weight gradient | + overlapped | . idle"
)


def draw_text(schedule: Schedule, costs: Costs = Costs(), *, width: int | None = None) -> str:  # noqa: B008
    """The schedule as a grid; a cell is the shortest step. Lines longer than ``width`` are folded."""
    timeline = simulate(schedule, costs)
    spans = [span for spans in timeline.spans for span in spans if span.end > span.start]
    unit = min((span.end - span.start for span in spans), default=1.0)
    num_cells = ceil(timeline.duration / unit - 0.5 - 1e-9)
    times = [f"{cell * unit:.4g}" for cell in range(num_cells)]
    size = 1 + max(map(len, times), default=0)
    for span in spans:
        first, last = _cells(span, unit)
        size = max(size, ceil((len(format_step(span.step)) + 1) / (last - first)))

    names = ["time", *(f"rank {rank}" for rank in range(schedule.num_ranks))]
    margin = max(map(len, names)) + 1
    rows = ["".join(time.ljust(size) for time in times)]
    rows += [_row(spans, unit, size, num_cells) for spans in timeline.spans]
    fold = max(1, ((width or margin + size * num_cells) - margin) // size) * size
    lines = [_title(schedule, timeline)]
    for start in range(0, size * num_cells, fold):
        lines.append("")
        lines += (f"{name.ljust(margin)}{row[start : start + fold]}" for name, row in zip(names, rows, strict=True))
    lines += ["", "idle, by rank: " + " ".join(f"{value:.4g}" for value in timeline.idle)]
    lines += ["held, by rank: " + " ".join(map(str, timeline.peak)), _LEGEND]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _title(schedule: Schedule, timeline: Timeline) -> str:
    ranks, microbatches = schedule.num_ranks, schedule.num_microbatches
    return (
        f"{schedule.name}: {ranks} rank{'s' * (ranks > 1)}, {microbatches} microbatch{'es' * (microbatches > 1)}, "
        f"time {timeline.duration:.4g}, {timeline.idle_share:.1%} idle"
    )


def _cells(span: Span, unit: float) -> tuple[int, int]:
    """The cells whose middle the span covers: first, and one past the last."""
    first, last = (ceil(time / unit - 0.5 - 1e-9) for time in (span.start, span.end))
    return first, max(last, first + 1)


def _row(spans: Sequence[Span], unit: float, size: int, num_cells: int) -> str:
    row = ""
    for span in (span for span in spans if span.end > span.start):
        first, last = _cells(span, unit)
        row += ".".ljust(size) * (first - len(row) // size)
        room = size * (last - first) - 1
        row += format_step(span.step).ljust(room, "-" if last - first > 1 else " ") + " "
    return row + ".".ljust(size) * (num_cells - len(row) // size)


_ROW, _CELL = (
    0.40,
    0.31,
)  # inches: a rank's height, and a forward's width where that gets neither too narrow nor too wide
_MARGINS = (0.70, 0.25, 0.55, 0.80)  # inches: left, right, top, bottom


def draw_picture(schedule: Schedule, costs: Costs, path: str | PathLike[str]) -> Path:
    """Write the schedule as a picture; the suffix of ``path`` is .png, .svg or .pdf."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigurationError(f"a picture cannot be written to {str(path)!r}: end its name in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            'a picture needs matplotlib: pip install "lightning-dualpipe[draw]"; the text grid needs nothing'
        ) from error
    timeline = simulate(schedule, costs)
    forward = min(costs.of((Action(stage, Kind.FORWARD, 0),)) for stage in range(schedule.num_stages))
    num_forwards = timeline.duration / forward if forward else 0.0
    width, height = min(max(_CELL * num_forwards, 7.0), 100.0), _ROW * schedule.num_ranks
    left, right, top, bottom = _MARGINS
    figure = Figure(figsize=(left + width + right, top + height + bottom), dpi=200 if width < 40 else 100)
    total_width, total_height = figure.get_size_inches()
    axes = figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))
    _draw_steps(axes, schedule, timeline, inches_per_time=width / (timeline.duration or 1.0))
    _draw_frame(axes, schedule, timeline)
    figure.savefig(path)
    return path


def _draw_steps(axes: "Axes", schedule: Schedule, timeline: Timeline, *, inches_per_time: float) -> None:
    from matplotlib.patches import Rectangle

    for rank, spans in enumerate(timeline.spans):
        axes.add_patch(Rectangle((0, rank + 0.06), timeline.duration, 0.88, facecolor=IDLE, linewidth=0))
        for step, start, end in spans:
            height = 0.88 / len(step)
            for part, action in enumerate(step):
                low = rank + 0.06 + part * height
                colour = COLOURS[action.kind][shade(schedule, action)]
                box = Rectangle((start, low), end - start, height, facecolor=colour, edgecolor="white", linewidth=0.7)
                axes.add_patch(box)
                label = str(action.microbatch)
                points = 72 * min(0.155, 0.62 * height * _ROW, (end - start) * inches_per_time / (0.75 * len(label)))
                if points >= 2:  # smaller is not read, only rendered
                    middle = ((start + end) / 2, low + height * 0.52)
                    axes.annotate(label, middle, ha="center", va="center_baseline", fontsize=points, color=INK)
            if len(step) == 2:
                outline = Rectangle((start, rank + 0.06), end - start, 0.88, fill=False, edgecolor=INK, linewidth=0.9)
                outline.set_zorder(3)
                axes.add_patch(outline)


def _draw_frame(axes: "Axes", schedule: Schedule, timeline: Timeline) -> None:
    """Title, names of the ranks, time, and what the colours mean."""
    axes.set_xlim(0, timeline.duration or 1.0)
    axes.set_ylim(schedule.num_ranks, 0)
    axes.set_yticks([rank + 0.5 for rank in range(schedule.num_ranks)])
    axes.set_yticklabels([f"rank {rank}" for rank in range(schedule.num_ranks)])
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.tick_params(axis="x", length=2, color=FAINT, labelsize=7, labelcolor=FAINT)
    axes.spines[:].set_visible(False)
    name, figures = _title(schedule, timeline).split(": ", 1)
    _note(axes, name, (0, 1), 9, fontsize=12, weight="bold", color=INK)
    _note(axes, figures, (1, 1), 9, ha="right", fontsize=9, color=FAINT)
    _draw_legend(axes, schedule)


def _note(axes: "Axes", text: str, corner: tuple[int, int], above: int, **style: Any) -> None:
    """Text at a corner of the grid, so many points above it."""
    offset = (0, above)
    axes.annotate(text, corner, offset, xycoords="axes fraction", textcoords="offset points", **style)


def _draw_legend(axes: "Axes", schedule: Schedule) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    steps = {step for steps in schedule.steps for step in steps}
    actions = {action for step in steps for action in step}
    entries: list[tuple[str, tuple[Patch, ...]]] = []
    for kind in Kind:
        shades = sorted({shade(schedule, action) for action in actions if action.kind is kind})
        if shades:
            entries.append((NAMES[kind], tuple(Patch(facecolor=COLOURS[kind][index]) for index in shades)))
    if any(len(step) == 2 for step in steps):
        entries.append(("overlapped", (Patch(facecolor="white", edgecolor=INK, linewidth=0.9),)))
    axes.legend(
        [patches for _, patches in entries],
        [name for name, _ in entries],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="upper left",
        bbox_to_anchor=(0, -0.32 / (_ROW * schedule.num_ranks)),
        borderaxespad=0,
        borderpad=0,
        ncols=len(entries),
        fontsize=8,
        labelcolor=INK,
        frameon=False,
        handlelength=2.2,
        handleheight=0.9,
        columnspacing=1.6,
    )
    if any(shade(schedule, action) for action in actions):
        paler = "the way up the V" if len(schedule.placement.routes) == 1 else "the second direction"
        _note(axes, f"paler: {paler}", (0, 0), -45, ha="left", fontsize=8, color=FAINT)
