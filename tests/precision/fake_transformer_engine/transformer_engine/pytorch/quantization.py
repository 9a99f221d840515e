"""Which recipe is in force: one answer for the whole process."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_dualpipe.precision.recipe import Operand
from transformer_engine.common.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
)

REASON = ""  # a test may set it: why nothing is available
IN_FORCE: list[Any] = [None]


class autocast:
    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> None:
        assert recipe is not None, "the default recipe depends on the GPU"
        self.recipe = recipe if enabled else None

    def __enter__(self) -> "autocast":
        IN_FORCE.append(self.recipe)
        return self

    def __exit__(self, *error: object) -> None:
        IN_FORCE.pop()


@contextmanager
def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: Any = None, fp8_group: Any = None, _graph: bool = False
) -> Iterator[None]:
    warnings.warn("fp8_autocast is deprecated, use autocast", DeprecationWarning, stacklevel=3)
    with autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph):
        yield


def is_fp8_available(return_reason: bool = False) -> Any:
    return (not REASON, REASON) if return_reason else not REASON


def is_mxfp8_available(return_reason: bool = False) -> Any:
    return (not REASON, REASON) if return_reason else not REASON


def is_fp8_block_scaling_available(return_reason: bool = False) -> Any:
    return (not REASON, REASON) if return_reason else not REASON


def operands(recipe: Any) -> tuple[Operand, Operand, Operand]:
    """Of activations, weights and gradients."""
    backward = "e5m2" if recipe.fp8_format is Format.HYBRID else "e4m3"
    if isinstance(recipe, MXFP8BlockScaling):
        return (Operand("e4m3", (1, 32), "power_of_two"),) * 3
    if isinstance(recipe, DelayedScaling):
        assert not recipe.reduce_amax, "the whole world would have to come to every reduction"
        return Operand("e4m3", None), Operand("e4m3", None), Operand(backward, None)
    kinds = [
        "power_of_two" if parameters.power_2_scale else "float32"
        for parameters in (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad)
    ]
    tiles: list[Any] = [None] * 3
    if isinstance(recipe, Float8BlockScaling):
        dims = recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim
        tiles = [(1, 128) if dim == 1 else (128, 128) for dim in dims]
    else:
        assert isinstance(recipe, Float8CurrentScaling)
    return tuple(map(Operand, ("e4m3", "e4m3", backward), tiles, kinds))  # type: ignore[return-value]
