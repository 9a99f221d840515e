"""A loss that jumps far above those before it keeps its gradients out of the weights.

    limit = median + max(threshold * 1.4826 * MAD, min_rise)          of the last ``window`` losses

Median and MAD (the median of the distances from the median; times 1.4826 it estimates the standard deviation of normal
noise) do not follow a single outlier, as mean and standard deviation would. A skipped loss is not among them.
"""

from collections import deque
from functools import reduce
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dualpipe.callbacks.step_guard import Action, StepGuard, over_ranks

__all__ = ["LossSpikeGuard", "spike_limit"]

_MAD_OF_NORMAL = 1.4826
_FEWEST = 4  # losses of which a median says something


class LossSpikeGuard(StepGuard):
    """Skips an optimizer step whose loss is far above the last ones, or ends the run before it.

    Its window is part of checkpoints: a resumed run decides as an uninterrupted one. Asking for the loss makes the host
    wait for the forward of each step on a GPU.

    Args:
        threshold: in standard deviations, as estimated from the window; see above.
        min_rise: above the median, in the loss's own units: less is no spike, however calm the window was.
        window: losses, of optimizer steps; as long as there are fewer nothing is judged.
        action: ``skip`` the step with a warning, or ``stop``: raise ``TrainingError`` on all ranks.
        patience: so many steps in a row are skipped; one more stops the run: that is no spike, but another level.
    """

    metric = "skipped_spikes"

    def __init__(
        self,
        threshold: float = 10.0,
        min_rise: float = 0.5,
        window: int = 100,
        action: Action = "skip",
        patience: int = 3,
    ) -> None:
        super().__init__(action, patience)
        problems = []
        if not threshold > 0:
            problems.append(f"threshold={threshold!r} must be positive")
        if not min_rise >= 0:
            problems.append(f"min_rise={min_rise!r} must not be negative")
        if not (isinstance(window, int) and window >= _FEWEST):
            problems.append(f"window={window!r} must be a whole number of at least {_FEWEST}")
        self._refuse(problems)
        self._threshold, self._min_rise = threshold, min_rise
        self._window: deque[float] = deque(maxlen=window)

    @override
    def _trouble(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, losses: list[tuple[int, Tensor]]
    ) -> str | None:
        if not losses:
            return None
        loss = float(over_ranks(trainer, reduce(torch.add, (loss for _, loss in losses)), "mean"))
        known = self._window
        limit = spike_limit(known, self._threshold, self._min_rise) if len(known) == known.maxlen else float("inf")
        if loss <= limit and loss != float("inf"):  # NaN is not
            known.append(loss)
            return None
        batches = ", ".join(str(batch) for batch, _ in losses)
        compared = f"above {limit:.6g}; the median of the last {len(known)} is {median(known):.6g}" if known else ""
        return f"the loss of batch {batches} is {loss:.6g}" + (f", {compared}" if limit < float("inf") else "")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "window": list(self._window)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._window.clear()
        self._window.extend(state_dict["window"])


def spike_limit(losses: "deque[float] | list[float]", threshold: float, min_rise: float) -> float:
    """The largest loss that is no spike."""
    middle = median(losses)
    noise = _MAD_OF_NORMAL * median(abs(loss - middle) for loss in losses)
    return middle + max(threshold * noise, min_rise)
