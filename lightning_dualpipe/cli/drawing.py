"""``lightning-dualpipe draw``: a schedule over time. Standard library, but for pictures."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.schedules import SCHEDULES, Costs, build_schedule
from lightning_dualpipe.schedules.draw import draw_picture, draw_text
from lightning_dualpipe.schedules.trace import write_schedule_trace

__all__ = ["draw"]


def draw(args: Sequence[str]) -> None:
    """
    Raises:
        ConfigurationError: there is no such schedule, costs fit none, or no text fits the width.
        MissingPackageError: a picture is wanted, and matplotlib is not there.
    """
    asked = _parser().parse_args(args)
    if asked.width is not None and asked.width < 1:
        raise ConfigurationError(f"--width {asked.width}: at least 1 column; without it, the terminal's width is taken")
    schedule = build_schedule(asked.schedule, asked.ranks, asked.microbatches)
    costs = Costs(asked.forward, asked.backward_input, asked.backward_weight, asked.overlapped, asked.send)
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        write = write_schedule_trace if asked.output.suffix.lower() == ".json" else draw_picture
        sys.stdout.write(f"{write(schedule, costs, asked.output)}\n")
    else:
        sys.stdout.write(draw_text(schedule, costs, width=asked.width or _terminal_width()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-dualpipe draw",
        description="Show who computes what and when, as text or as a picture.",
        epilog="A cost is one number for all stages, or one for each: 1,1,1,2.",
    )
    parser.add_argument("--schedule", default="dualpipe", help=f"{', '.join(SCHEDULES)} (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=8, help="pieces of a batch (default: %(default)s)")
    parser.add_argument("--forward", type=cost, default=1.0, help="time of a forward (default: %(default)g)")
    parser.add_argument(
        "--backward-input", type=cost, default=1.0, help="time of the gradient of the inputs (default: %(default)g)"
    )
    parser.add_argument(
        "--backward-weight", type=cost, default=1.0, help="time of the gradient of the weights (default: %(default)g)"
    )
    parser.add_argument(
        "--overlapped", type=cost, help="time of a forward and a backward at once (default: overlapping gains nothing)"
    )
    parser.add_argument("--send", type=float, default=0.0, help="time between two ranks (default: %(default)g)")
    parser.add_argument("--width", type=int, help="fold the text after so many columns (default: the terminal's)")
    parser.add_argument(
        "--output",
        type=Path,
        help="write a file instead: a picture (.png, .svg, .pdf), or a trace for ui.perfetto.dev (.json), "
        "in which a cost of 1 is a millisecond",
    )
    return parser


def cost(text: str) -> float | tuple[float, ...]:
    numbers = tuple(map(float, text.split(",")))
    return numbers if len(numbers) > 1 else numbers[0]


def _terminal_width() -> int | None:
    """Text that goes into a file or another program is not folded."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
