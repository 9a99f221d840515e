"""FP8 by torch alone: ``torch.nn.functional.scaled_mm`` with the tiles of DeepSeek-V3, on Hopper.

Quantising is ``reference.quantise``, on the GPU as anywhere: plain torch, a dozen kernels where Transformer Engine
has one. So this is for machines without that library, and a second opinion on it; experts are a loop.

    forward          1 x 128  times  128 x 128       y  = x W^T
    input gradient   1 x 128  times  128 x 128       dx = g W
    weight gradient  1 x 128  times    1 x 128       dW = g^T x, tiles along the tokens

What cuBLAS wants of operands, scales and their strides is in ``scaled_mm_operands``, and nowhere else.

Shapes: M, N outer dimensions, K the one that is summed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.fp8_weight import QuantisedWeight
from lightning_dualpipe.precision.quantising import QuantisingBackend
from lightning_dualpipe.precision.recipe import Block, Recipe
from lightning_dualpipe.precision.reference import Quantised

__all__ = ["TorchBackend", "multiply", "scaled_mm_operands", "why_not_torch"]


def why_not_torch(recipe: Recipe) -> str | None:
    """What stands against it here, with what would help; None if nothing does."""
    if not isinstance(recipe, Block):
        return f"torch multiplies tiles of recipe 'block' only, not those of {recipe.name!r}; use backend='te'"
    if not torch.cuda.is_available():
        return "torch multiplies FP8 tiles on CUDA devices only, and sees none here; use backend='emulate'"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return (
            f"torch multiplies FP8 tiles on Hopper (SM90) only, and this is {torch.cuda.get_device_name()} "
            f"(SM{major}{minor}); use backend='te', or recipe='bf16'"
        )
    cuda = torch.version.cuda or "none"
    if tuple(int(part) for part in cuda.split(".") if part.isdigit()) < (12, 9):
        return f"FP8 tiles need a torch built for CUDA 12.9 or newer, and this one is for {cuda}; install such a torch"
    return None


class _TurnedWeight(QuantisedWeight):
    """Keeps W^T as a copy: turned for every microbatch, it would cost as much as the product of a few tokens."""

    __slots__ = ()

    def columns(self, weight: Tensor) -> tuple[Quantised, ...]:
        rows = iter(self.rows(weight))
        return self._get("columns", weight, lambda _: _turned(next(rows)))


class TorchBackend(QuantisingBackend):
    """Linear layers and stacks of experts of any size: what is no multiple of 16 is padded, which costs a copy.

    Raises:
        ConfigurationError: another recipe, or a machine that cannot.
    """

    name = "torch"
    keeps = _TurnedWeight

    def __init__(self, recipe: Recipe) -> None:
        refused = why_not_torch(recipe)
        if refused is not None:
            raise ConfigurationError(refused)
        super().__init__(recipe, multiply)


def _turned(x: Quantised) -> Quantised:
    return Quantised(x.mT.values_MK.contiguous(), x.mT.inverse_scales.contiguous(), x.mT.tile)


# ---- operands ---------------------------------------------------------------------------------


def multiply(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """``a b^T`` [M, N] by tensor cores, sums of 128 products promoted to float32, rounded to ``dtype``."""
    if dtype == torch.float64:
        raise ConfigurationError("tensor cores sum in float32 at most, and float64 is asked for; use backend='emulate'")
    (m, k), n = a_MK.values_MK.shape, len(b_NK.values_MK)
    if not m * n * k:
        return a_MK.inverse_scales.new_zeros(m, n, dtype=dtype)
    operands = scaled_mm_operands(a_MK, b_NK)
    product = F.scaled_mm(
        operands.a,
        operands.b,
        operands.a_scales,
        operands.a_scaling,
        operands.b_scales,
        operands.b_scaling,
        output_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        use_fast_accum=False,
    )
    return product[:m, :n].to(dtype)


@dataclass(frozen=True)
class ScaledMMOperands:
    """Arguments of ``scaled_mm``, M, N and K padded to multiples of 16."""

    a: Tensor  # [M, K], row after row
    b: Tensor  # [K, N], column after column
    a_scales: Tensor
    b_scales: Tensor
    a_scaling: F.ScalingType
    b_scaling: F.ScalingType


def scaled_mm_operands(a_MK: Quantised, b_NK: Quantised) -> ScaledMMOperands:
    """How cuBLAS wants it (CUDA 12.9, SM90; checked in torch's ``ScaledBlas.cpp``, with T = ceil(K / 128)).

        1 x 128      scales [outer, T], strides (1, outer)
        128 x 128    scales [T rounded up to a multiple of 4, ceil(outer / 128)], strides (1, that): unpadded,
                     products were silently wrong before torch 2.10
        both 128 x 128: there is no kernel

    K and N are multiples of 16 (rows of 16 bytes). So is M here: with 1 x 128 scales every column of scales starts
    at a multiple of 16 bytes, which 4 rows would do for.
    """
    kinds = a_MK.tile, b_NK.tile
    assert kinds in ((_ROW, _ROW), (_ROW, _SQUARE), (_SQUARE, _ROW)), f"no kernel multiplies tiles {kinds}"
    a, a_scales = _operand(a_MK)
    b, b_scales = _operand(b_NK)
    return ScaledMMOperands(a, b.t(), a_scales, b_scales, _SCALING[a_MK.tile], _SCALING[b_NK.tile])


_ROW, _SQUARE = (1, 128), (128, 128)
_SCALING = {_ROW: F.ScalingType.BlockWise1x128, _SQUARE: F.ScalingType.BlockWise128x128}


def _operand(x: Quantised) -> tuple[Tensor, Tensor]:
    """Values, row after row, and scales. Padding is zeros, whose scale is of no matter."""
    rows, columns = x.values_MK.shape
    more_rows, more_columns = -rows % 16, -columns % 16
    values = x.values_MK
    if more_rows or more_columns:
        # as bytes: not every operation takes FP8
        values = F.pad(values.view(torch.uint8), (0, more_columns, 0, more_rows)).view(values.dtype)
    scales = x.inverse_scales
    if x.tile == _ROW:
        return values.contiguous(), F.pad(scales.mT, (0, more_rows), value=1.0).contiguous().mT
    return values.contiguous(), F.pad(scales, (0, -scales.shape[1] % 4), value=1.0).contiguous().mT
