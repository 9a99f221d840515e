"""FP8 on any machine: the definition itself, as a backend. Right to the last bit, and slower than no FP8."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.fp8_grouped_linear import FP8GroupedLinear
from lightning_dualpipe.precision.fp8_linear import FP8Linear, Operands
from lightning_dualpipe.precision.fp8_weight import Epoch
from lightning_dualpipe.precision.recipe import Delayed, Recipe
from lightning_dualpipe.precision.reference import multiply

__all__ = ["EmulateBackend", "without_kernels"]


def without_kernels(recipe: Recipe) -> str:
    """What runs where there are none for ``recipe``, as errors recommend it."""
    return "recipe='current' with backend='emulate'" if isinstance(recipe, Delayed) else "backend='emulate'"


class EmulateBackend:
    name = "emulate"

    def __init__(self, recipe: Recipe) -> None:
        if isinstance(recipe, Delayed):
            raise ConfigurationError(
                "recipe 'delayed' is not emulated: its scales come from earlier steps, which only Transformer Engine "
                "keeps; use backend='te', or recipe='current', whose scales come from the tensors themselves"
            )
        assert recipe.activation and recipe.weight and recipe.gradient, f"{recipe} quantises nothing"
        self._operands: Operands = recipe.activation, recipe.weight, recipe.gradient
        self._epoch = Epoch()

    def linear(self) -> FP8Linear:
        return FP8Linear(self._operands, self._epoch, multiply)

    def grouped_linear(self) -> FP8GroupedLinear:
        return FP8GroupedLinear(self._operands, self._epoch, multiply)

    def weights_changed(self) -> None:
        self._epoch.number += 1

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()
