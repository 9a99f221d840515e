"""A weight in FP8, kept for the microbatches between two steps of the optimizer.

What is kept is used only for the very parameter, in the very state, that it was made of. Its version counts
writes in place, but neither those through ``.data`` nor those of torch's fused optimizers. So the step of any
optimizer of this process ends what is kept, and whoever writes otherwise says so (``Backend.weights_changed``).
Of a weight that is computed, and is another one with each forward, nothing is kept.

Who averages weights (Lightning's ``EMAWeightAveraging``) exchanges them through ``.data`` for an evaluation, and back.
So where no gradients are wanted nothing is kept, nor is what was kept used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_dualpipe.precision.recipe import Operand
from lightning_dualpipe.precision.reference import Quantised, quantise

__all__ = ["Epoch", "QuantisedWeight", "WeightState"]


@dataclass(slots=True)
class Epoch:
    """Counts what no version of a tensor does. Shared by all weights of a backend."""

    number: int = 0


_steps = Epoch()  # of all optimizers


def _count_step(*_: object) -> None:
    _steps.number += 1


register_optimizer_step_post_hook(_count_step)


class WeightState:
    """A parameter as it was when something was made of it.

    Addresses are given again when their owner is gone. So object and memory are known by references that keep
    neither of them, but let nobody else have their names.
    """

    __slots__ = ("_counts", "_memory", "_owner")

    def __init__(self, weight: Tensor, epoch: Epoch) -> None:
        assert isinstance(weight, nn.Parameter), "a tensor that was computed lives for one forward"
        self._owner = weakref.ref(weight)
        self._memory = StorageWeakRef(weight.untyped_storage())
        self._counts = _counts(weight, epoch)

    def is_of(self, weight: Tensor, epoch: Epoch) -> bool:
        """Whether what was made of it is good for ``weight`` now."""
        return (
            self._owner() is weight
            and self._memory.cdata == weight.untyped_storage()._cdata
            and self._counts == _counts(weight, epoch)
        )


def _counts(weight: Tensor, epoch: Epoch) -> tuple[int, ...]:
    return weight.data_ptr(), weight._version, epoch.number, _steps.number


@dataclass(slots=True)
class QuantisedWeight:
    how: Operand
    epoch: Epoch
    _made_of: WeightState | None = None
    _kept: dict[str, tuple[Quantised, ...]] = field(default_factory=dict)

    def rows(self, weight: Tensor, *, keep: bool = True) -> tuple[Quantised, ...]:
        """W of each expert (one, of a matrix), to be summed over its columns: for the forward.

        ``keep``: for a training step; what is kept of a parameter lasts until the next.
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
        if not isinstance(weight, nn.Parameter):
            return tuple(make(w_OI) for w_OI in _matrices(weight))
        if self._made_of is None or not self._made_of.is_of(weight, self.epoch):
            self._made_of, self._kept = WeightState(weight, self.epoch), {}
        if which not in self._kept:
            self._kept[which] = tuple(make(w_OI) for w_OI in _matrices(weight))
        return self._kept[which]


def _matrices(weight: Tensor) -> Tensor:
    source = weight.detach()
    return source if source.dim() == 3 else source[None]
