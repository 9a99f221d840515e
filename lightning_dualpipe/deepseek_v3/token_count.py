"""How many labels a run has trained on, where the device is waited for only when somebody asks."""

from torch import Tensor

__all__ = ["TokenCount"]


class TokenCount:
    """Counts whole optimizer steps: what the batches of a step have added can be taken back until it is kept."""

    def __init__(self, tokens: float = 0.0) -> None:
        self._before = tokens  # known on the host
        self._steps: Tensor | float = 0.0  # of the optimizer steps since
        self._batches: Tensor | float = 0.0  # of the batches since the last of them

    def add(self, tokens: Tensor) -> None:
        """The labels of one batch, over all ranks."""
        self._batches = self._batches + tokens

    def keep(self) -> None:
        """The optimizer has stepped."""
        self._steps, self._batches = self._steps + self._batches, 0.0

    def take_back(self) -> None:
        """It will not."""
        self._batches = 0.0

    def total(self) -> float:
        self._before, self._steps = self._before + float(self._steps), 0.0
        return self._before + float(self._batches)
