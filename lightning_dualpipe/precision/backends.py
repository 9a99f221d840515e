"""Who multiplies in FP8: by name, or the best that works here, with the reason.

te         Transformer Engine                       NVIDIA GPUs; the fastest, and the only one that knows ``delayed``
torch      ``F.scaled_mm`` of torch itself          Hopper, recipe ``block``
emulate    the definition, in plain torch           anywhere, more slowly than without FP8
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.precision.emulate import EmulateBackend, without_kernels
from lightning_dualpipe.precision.matmul import Backend
from lightning_dualpipe.precision.recipe import BF16, MXFP8, Block, Current, Delayed, Recipe

__all__ = ["BACKENDS", "BackendChoice", "choose_backend"]

BACKENDS = ("auto", "te", "torch", "emulate")

_ANY = (99, 0)
_CAPABILITY = {  # from which on, and up to which, GPUs have kernels for a recipe
    Block: ((9, 0), (12, 0), "Hopper (H100, H200) or Blackwell (B200)"),  # there it is computed as MXFP8
    Current: ((8, 9), _ANY, "Ada (L4, L40S), Hopper (H100, H200) or newer"),
    Delayed: ((8, 9), _ANY, "Ada (L4, L40S), Hopper (H100, H200) or newer"),
    MXFP8: ((10, 0), (12, 0), "Blackwell (B200)"),  # of a data centre
}


@dataclass(frozen=True, slots=True)
class BackendChoice:
    name: str | None  # None: nothing multiplies in FP8
    recipe: Recipe
    reasons: tuple[str, ...]

    def build(self) -> Backend:
        assert self.name is not None, "there is nothing to build"
        if self.name == "emulate":
            return EmulateBackend(self.recipe)
        name = {"te": "TEBackend", "torch": "TorchBackend"}[self.name]
        return cast(Callable[[Recipe], Backend], getattr(_module(self.name), name))(self.recipe)

    def __str__(self) -> str:
        return f"backend={self.name or 'none'!r}: " + "; ".join(self.reasons)


def choose_backend(
    wanted: str, recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> BackendChoice:
    """
    Args:
        wanted: one of ``BACKENDS``. ``auto`` takes none on a GPU that has no kernels for the recipe.
        dtype: of activations.

    Raises:
        MissingPackageError: what was asked for is not installed.
        ConfigurationError: what was asked for cannot run here.
    """
    if isinstance(recipe, BF16):
        return BackendChoice(None, recipe, ("recipe 'bf16' quantises nothing",))
    if wanted != "auto":
        refused = _why_not(wanted, recipe, device, dtype)
        if refused is None:
            return BackendChoice(wanted, recipe, ("as asked for",))
        kind = MissingPackageError if _is_missing(wanted, recipe, device, dtype) else ConfigurationError
        raise kind(f"backend={wanted!r} cannot run: {refused}")
    if device.type != "cuda" or dtype == torch.float64:
        if (refused := _why_not("emulate", recipe, device, dtype)) is not None:
            raise ConfigurationError(f"recipe {recipe.name!r} cannot run on {device.type}: {refused}")
        where = "in float64" if dtype == torch.float64 else f"on {device.type}"
        return BackendChoice("emulate", recipe, (f"no kernels multiply FP8 {where}",))
    if (lacking := _what_the_gpu_lacks(recipe, device)) is not None:
        return BackendChoice(None, recipe, (lacking,))
    against = {name: _why_not(name, recipe, device, dtype) for name in ("te", "torch")}
    for name, reason in against.items():
        if reason is None:
            return BackendChoice(name, recipe, ("it can be used here",))
    raise ConfigurationError.of(
        f"recipe {recipe.name!r} cannot run, though this GPU could; "
        f"{without_kernels(recipe)} can, slower than without FP8",
        [f"{name}: {reason}" for name, reason in against.items()],
    )


def _why_not(name: str, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str | None:
    """What stands against this backend, with what would help; None if nothing does."""
    if name == "emulate":
        if not isinstance(recipe, Delayed):
            return None
        return (
            "scales of 'delayed' come from earlier steps, which only Transformer Engine on a GPU "
            "keeps; use recipe='current', whose scales come from the tensors themselves"
        )
    if device.type != "cuda":
        return (
            f"{_NAMES[name]} needs CUDA devices, and this run computes on {device.type}; use {without_kernels(recipe)}"
        )
    if dtype == torch.float64:
        return f"{_NAMES[name]} has no kernels for float64; use weights='bf16-true', or {without_kernels(recipe)}"
    if (lacking := _what_the_gpu_lacks(recipe, device)) is not None:
        return lacking
    refused = getattr(_module(name), f"why_not_{name}")(recipe)
    return cast(str | None, refused)


_NAMES = {"te": "Transformer Engine", "torch": "F.scaled_mm"}


def _what_the_gpu_lacks(recipe: Recipe, device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if _has_kernels(capability, type(recipe)):
        return None
    name = f"{torch.cuda.get_device_name(device)} (SM{capability[0]}{capability[1]})"
    others = [kind.name for kind in (Block, Current) if _has_kernels(capability, kind)]
    instead = f"recipe={others[0]!r} or " if others else ""
    needed = _CAPABILITY[type(recipe)][2]
    return f"recipe {recipe.name!r} needs {needed}, and this is {name}; use {instead}recipe='bf16'"


def _has_kernels(capability: tuple[int, int], kind: type[Recipe]) -> bool:
    first, end, _ = _CAPABILITY[kind]
    return first <= capability < end


def _is_missing(name: str, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it would run here, if it were installed."""
    fits = name == "te" and device.type == "cuda" and dtype != torch.float64
    return fits and _what_the_gpu_lacks(recipe, device) is None and find_spec("transformer_engine") is None


def _module(name: str) -> object:
    """Imported when it is asked for: it knows a library that may be absent."""
    return import_module(f"lightning_dualpipe.precision.{name}_backend")
