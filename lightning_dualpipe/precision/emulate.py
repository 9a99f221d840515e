"""FP8 on any machine: the definition itself, as a backend. Right to the last bit, and slower than no FP8."""

from __future__ import annotations

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.quantising import QuantisingBackend
from lightning_dualpipe.precision.recipe import Delayed, Recipe
from lightning_dualpipe.precision.reference import multiply

__all__ = ["EmulateBackend", "without_kernels"]


def without_kernels(recipe: Recipe) -> str:
    """What runs where there are none for ``recipe``, as errors recommend it."""
    return "recipe='current' with backend='emulate'" if isinstance(recipe, Delayed) else "backend='emulate'"


class EmulateBackend(QuantisingBackend):
    name = "emulate"

    def __init__(self, recipe: Recipe) -> None:
        if isinstance(recipe, Delayed):
            raise ConfigurationError(
                "recipe 'delayed' is not emulated: its scales come from earlier steps, which only Transformer Engine "
                "keeps; use backend='te', or recipe='current', whose scales come from the tensors themselves"
            )
        super().__init__(recipe, multiply)
