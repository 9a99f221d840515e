"""What backends have in common that quantise as the definition does, and differ in who multiplies."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from lightning_dualpipe.precision.fp8_grouped_linear import FP8GroupedLinear
from lightning_dualpipe.precision.fp8_linear import FP8Linear, Multiply, Operands
from lightning_dualpipe.precision.fp8_weight import Epoch, QuantisedWeight
from lightning_dualpipe.precision.recipe import Recipe

__all__ = ["QuantisingBackend"]


class QuantisingBackend:
    """A ``matmul.Backend``. Its subclasses say what multiplies, and what is kept of a weight."""

    name: str
    keeps: ClassVar[type[QuantisedWeight]] = QuantisedWeight

    def __init__(self, recipe: Recipe, multiply: Multiply) -> None:
        assert recipe.activation and recipe.weight and recipe.gradient, f"{recipe} quantises nothing"
        self._operands: Operands = recipe.activation, recipe.weight, recipe.gradient
        self._multiply = multiply
        self._epoch = Epoch()

    def linear(self) -> FP8Linear:
        return FP8Linear(self._operands, self._weight(), self._multiply)

    def grouped_linear(self) -> FP8GroupedLinear:
        return FP8GroupedLinear(self._operands, self._weight(), self._multiply)

    def weights_changed(self) -> None:
        self._epoch.number += 1

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _weight(self) -> QuantisedWeight:
        return self.keeps(self._operands[1], self._epoch)
