"""A weight in FP8, kept for the microbatches between two steps of the optimizer.

What is kept is used only for the very tensor, in the very state, that it was made of. Its version counts
writes in place, but neither those through ``.data`` nor those of torch's fused optimizers. So the step of any
optimizer of this process ends what is kept, and whoever writes otherwise says so (``Backend.weights_changed``).

Who averages weights (Lightning's ``EMAWeightAveraging``) exchanges them through ``.data`` for an evaluation, and back.
So where no gradients are wanted nothing is kept, nor is what was kept used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_dualpipe.precision.recipe import Operand
from lightning_dualpipe.precision.reference import Quantised, quantise

__all__ = ["Epoch", "QuantisedWeight", "state_of"]


@dataclass(slots=True)
class Epoch:
    """Counts what no version of a tensor does. Shared by all weights of a backend."""

    number: int = 0


_steps = Epoch()  # of all optimizers


def _count_step(*_: object) -> None:
    _steps.number += 1


register_optimizer_step_post_hook(_count_step)


def state_of(weight: Tensor, epoch: Epoch) -> tuple[int, ...]:
    """What is made of ``weight`` is good for as long as this stays the same."""
    return weight.data_ptr(), weight._version, epoch.number, _steps.number


@dataclass(slots=True)
class QuantisedWeight:
    how: Operand
    epoch: Epoch
    _made_of: tuple[int, ...] | None = None
    _kept: dict[str, tuple[Quantised, ...]] = field(default_factory=dict)

    def rows(self, weight: Tensor, *, keep: bool = True) -> tuple[Quantised, ...]:
        """W of each expert (one, of a matrix), to be summed over its columns: for the forward.

        ``keep``: for a training step; what is kept of it lasts until the next.
        """
        if not keep:
            return tuple(quantise(w_OI, self.how) for w_OI in _matrices(weight))
        return self._get("rows", weight, lambda w_OI: quantise(w_OI, self.how))

    def columns(self, weight: Tensor) -> tuple[Quantised, ...]:
        """W^T, to be summed over the rows of W: for the gradient of the input."""
        if self.how.tile is not None and self.how.tile[0] == self.how.tile[1]:
            return tuple(w.mT for w in self.rows(weight))
        return self._get("columns", weight, lambda w_OI: quantise(w_OI.mT, self.how))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy makes its own: it belongs to another weight."""
        return type(self), (self.how, self.epoch)

    def _get(self, which: str, weight: Tensor, make: Callable[[Tensor], Quantised]) -> tuple[Quantised, ...]:
        state = state_of(weight, self.epoch)
        if state != self._made_of:
            self._made_of, self._kept = state, {}
        if which not in self._kept:
            self._kept[which] = tuple(make(w_OI) for w_OI in _matrices(weight))
        return self._kept[which]


def _matrices(weight: Tensor) -> Tensor:
    source = weight.detach()
    return source if source.dim() == 3 else source[None]
