"""How the operands of matrix multiplications are quantised to FP8: recipes, by name and as values.

    y  = x W^T      x: activation    W: weight
    dx = g W        g: gradient      W: weight
    dW = g^T x      g: gradient      x: activation

Each product quantises its own two operands from their high-precision source, in tiles that lie along
the dimension that is summed over. ``precision.reference`` defines what that means to the last bit.

    block     1 x 128 tiles, weights 128 x 128, E4M3 throughout (DeepSeek-V3 report, section 3.3.2)
    current   one scale per tensor, from the tensor itself; gradients E5M2
    delayed   one scale per tensor, from the largest values of earlier steps; gradients E5M2
    mxfp8     1 x 32 tiles, scales that are powers of two, E4M3 throughout (OCP MX v1.0); Blackwell
    bf16      nothing is quantised
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["BF16", "MXFP8", "Block", "Current", "Delayed", "Operand", "Recipe", "ScaleKind", "recipe_of"]

Format = Literal["e4m3", "e5m2"]
ScaleKind = Literal["power_of_two", "float32"]


@dataclass(frozen=True, slots=True)
class Operand:
    """How one operand of a product is quantised, its columns being what is summed over."""

    format: Format
    tile: tuple[int, int] | None  # (rows, columns) that share a scale; None: all of it
    scales: ScaleKind = "float32"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Base of all recipes."""

    name: ClassVar[str]

    @property
    def activation(self) -> Operand | None:
        """None: not quantised."""
        return None

    @property
    def weight(self) -> Operand | None:
        return None

    @property
    def gradient(self) -> Operand | None:
        return None


@dataclass(frozen=True, slots=True)
class BF16(Recipe):
    name: ClassVar[str] = "bf16"


@dataclass(frozen=True, slots=True)
class Block(Recipe):
    """DeepSeek-V3's.

    Powers of two cost 2 % of the error of a product, and let tokens travel to their experts, and tiles be
    turned, without a second rounding.
    """

    name: ClassVar[str] = "block"
    scales: ScaleKind = "power_of_two"

    @property
    def activation(self) -> Operand:
        return Operand("e4m3", (1, 128), self.scales)

    @property
    def weight(self) -> Operand:
        return Operand("e4m3", (128, 128), self.scales)

    @property
    def gradient(self) -> Operand:
        return Operand("e4m3", (1, 128), self.scales)


@dataclass(frozen=True, slots=True)
class PerTensor(Recipe):
    """One scale for all of a tensor."""

    gradient_format: Format = "e5m2"

    @property
    def activation(self) -> Operand:
        return Operand("e4m3", None)

    @property
    def weight(self) -> Operand:
        return Operand("e4m3", None)

    @property
    def gradient(self) -> Operand:
        return Operand(self.gradient_format, None)


@dataclass(frozen=True, slots=True)
class Current(PerTensor):
    name: ClassVar[str] = "current"


@dataclass(frozen=True, slots=True)
class Delayed(PerTensor):
    """Remembers: what a tensor is scaled by depends on the order in which microbatches were seen."""

    name: ClassVar[str] = "delayed"
    history: int = 1024  # steps


@dataclass(frozen=True, slots=True)
class MXFP8(Recipe):
    name: ClassVar[str] = "mxfp8"

    @property
    def activation(self) -> Operand:
        return Operand("e4m3", (1, 32), "power_of_two")

    weight = activation
    gradient = activation


_RECIPES: dict[str, type[Recipe]] = {each.name: each for each in (Block, Current, Delayed, MXFP8, BF16)}


def recipe_of(recipe: str | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe by its name, or by ``{"name": …}`` and settings.

    Raises:
        ConfigurationError: an unknown name or setting, or a value that a setting does not take.
    """
    if isinstance(recipe, Recipe):  # made by its class, which takes any values
        settings = {"name": recipe.name, **{field.name: getattr(recipe, field.name) for field in fields(recipe)}}
    elif isinstance(recipe, Mapping):
        settings = dict(recipe)
    else:
        settings = {"name": recipe}
    if "name" not in settings:
        raise ConfigurationError(f"recipe {dict(settings)} has no name; write {{'name': 'block', …}}")
    name = settings.pop("name")
    if not isinstance(name, str) or name not in _RECIPES:
        raise ConfigurationError(f"recipe {name!r} is not one of {', '.join(_RECIPES)}{_meant_recipe(name)}")
    kind = _RECIPES[name]
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    for key, value in settings.items():
        if key not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has no settings"
            raise ConfigurationError(f"recipe {name!r} has no setting {key!r}: {has}{_meant(key, known)}")
        choices = get_args(hints[key])
        fits = value in choices if choices else type(value) is int and value > 0
        if not fits:
            takes = f"one of {', '.join(map(repr, choices))}" if choices else "a positive integer"
            raise ConfigurationError(f"{key}={value!r} of recipe {name!r} must be {takes}")
    return kind(**settings)


def _meant_recipe(name: object) -> str:
    return "; did you mean 'block'?" if name in ("fp8", "e4m3") else _meant(name, _RECIPES)


def _meant(word: object, known: Mapping[str, object] | list[str]) -> str:
    close = get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
