"""Loss over optimizer steps, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from lightning_dualpipe.errors import MissingPackageError

__all__ = ["Curve", "draw_losses"]

Curve = Sequence[tuple[int, float]]
"""(optimizer steps so far, loss)"""


def draw_losses(train: Curve, validation: Curve, path: Path) -> Path:
    """Write both curves to ``path``, in the format of its suffix; either may be empty.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingPackageError(
            'pictures need matplotlib: pip install "lightning-dualpipe[draw]"; the numbers are in the metrics log'
        ) from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        # a line through a single point has no length, and would not be seen
        dot = "o" if len(train) == 1 else None
        axes.plot(*zip(*train, strict=True), color="#7d9fd3", linewidth=1.2, marker=dot, markersize=4, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d9822b", marker="o", markersize=4, label="validation")
        steps, loss = validation[-1]
        axes.annotate(f"{loss:.3f}", (steps, loss), xytext=(0, 8), textcoords="offset points", ha="right")
    if train or validation:
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer steps", ylabel="loss, nats per token", xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path
