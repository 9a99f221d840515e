"""The seam between layers and number formats: who computes the products of a layer.

A layer calls its matmul with its parameters as they are; what format the operands take on the way, where
quantised weights are kept, and which kernels run, is the matmul's own business. ``linear`` and
``grouped_linear`` of this folder are the ones of a layer in high precision; a ``Backend`` makes others.

Shapes: R rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_dualpipe.interface import WeightGradients

__all__ = ["Backend", "GroupedMatmul", "HasGroupedMatmuls", "Matmul"]


class Matmul(Protocol):
    """``x W^T + b`` of one layer."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, queue: WeightGradients | None) -> Tensor:
        """``y [.., O]`` of ``x [.., I]``; the gradient of the weight waits while ``queue.deferring``."""
        ...


class GroupedMatmul(Protocol):
    """``x W_e^T`` of one stack of experts, rows sorted by expert."""

    def __call__(
        self, x_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int] | Tensor, queue: WeightGradients | None
    ) -> Tensor:
        """``y_RO``; the first ``counts[0]`` rows belong to expert 0."""
        ...


@runtime_checkable
class HasGroupedMatmuls(Protocol):
    """A module with stacks of experts: by the name of each stacked parameter [E, O, I], what multiplies with it."""

    grouped_matmuls: dict[str, GroupedMatmul]


class Backend(Protocol):
    """Makes the matmuls of layers, one for each weight: it may keep what it makes of that weight."""

    name: str

    def linear(self) -> Matmul: ...

    def grouped_linear(self) -> GroupedMatmul: ...

    def weights_changed(self) -> None:
        """Forget whatever was made of weights: an optimizer has stepped."""
        ...

    def context(self) -> AbstractContextManager[object]:
        """Around each forward of a model: what is learned from one forward for the next is learned when it ends."""
        ...
