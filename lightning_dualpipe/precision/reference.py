"""The definition of record: what quantising to FP8, and multiplying in it, mean to the last bit.

    scale   = largest representable value / largest magnitude in the tile        float32, one per tile
    values  = round(x * scale) to FP8, ties to even, beyond the largest: the largest
    inverse = 1 / scale                 what is kept beside the values: x is about values * inverse

The scale of a tile without magnitude, or with an infinite one, is 1; one beyond float32 is the largest
float32. A scale that must be a power of two is rounded down, so nothing overflows. Infinities become
the largest value, NaN stays NaN and has no say in the scale. Tiles at the edges are smaller.

Products are sums in float32 of the exact products of FP8 values, scaled once per tile; ``multiply``
scales first, which differs by the rounding of float32 alone. Everything here is plain torch and runs
anywhere; every backend is tested against it. The semantics are Transformer Engine's (2.20).

Shapes: M, N outer dimensions, K the one that is summed over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dualpipe.precision.recipe import Operand, Recipe

__all__ = [
    "FORMATS",
    "Quantised",
    "dequantise",
    "forward",
    "grad_input",
    "grad_weight",
    "multiply",
    "multiply_tile_by_tile",
    "quantise",
    "round_to_grid",
]

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix in FP8."""

    values_MK: Tensor  # FP8
    inverse_scales: Tensor  # float32, one for each tile: [ceil(M / rows), ceil(K / columns)]
    tile: tuple[int, int]

    @property
    def mT(self) -> Quantised:
        """Transposed, tiles included: the same numbers, and for square tiles what quantising ``x.mT`` gives."""
        return Quantised(self.values_MK.mT, self.inverse_scales.mT, (self.tile[1], self.tile[0]))


def quantise(x_MK: Tensor, how: Operand) -> Quantised:
    """``x_MK`` (rounded to float32, if it is wider) in FP8."""
    rows, columns = how.tile or _whole(x_MK)
    dtype, largest = FORMATS[how.format], torch.finfo(FORMATS[how.format]).max
    beyond = torch.finfo(x_MK.dtype if x_MK.dtype == torch.bfloat16 else torch.float32).max
    m, k = x_MK.shape
    tiles = F.pad(x_MK.float(), (0, -k % columns, 0, -m % rows)).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    magnitude = tiles.abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax((1, 3), keepdim=True)
    scales = _scales(magnitude, largest, beyond, power_of_two=how.scales == "power_of_two")
    values = (tiles * scales).clamp_(-largest, largest).to(dtype)
    inverse = scales.reciprocal().view(scales.shape[0], scales.shape[2])
    return Quantised(values.flatten(2, 3).flatten(0, 1)[:m, :k], inverse, (rows, columns))


def dequantise(x: Quantised) -> Tensor:
    """float32 [M, K]."""
    (m, k), (rows, columns) = x.values_MK.shape, x.tile
    scales = x.inverse_scales
    if rows > 1:
        scales = scales.repeat_interleave(rows, 0)[:m]
    # in one order in memory, whichever way it lies: sums of products depend on that, in the last place
    values_MK = x.values_MK.to(torch.float32, memory_format=torch.contiguous_format)
    return values_MK.mul_(scales.repeat_interleave(columns, 1)[:, :k])


def multiply(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """``a b^T`` [M, N], summed in float32 (in float64, if that is what is asked for) and rounded to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (dequantise(a_MK).to(wide) @ dequantise(b_NK).to(wide).mT).to(dtype)


def multiply_tile_by_tile(a_MK: Quantised, b_NK: Quantised) -> Tensor:
    """``a b^T`` as tensor cores and the accumulators behind them do it: a sum over tiles of scaled sums of products.

    float32 [M, N]. The report promotes partial sums every 128 elements (section 3.3.2).
    """
    step = math.gcd(a_MK.tile[1], b_NK.tile[1])
    m, k = a_MK.values_MK.shape
    n = len(b_NK.values_MK)
    sum_MN = a_MK.inverse_scales.new_zeros(m, n)
    for start in range(0, k, step):
        ours, theirs = (x.values_MK[:, start : start + step].float() for x in (a_MK, b_NK))
        a_M, b_N = (_scales_of_column(x, start) for x in (a_MK, b_NK))
        sum_MN += (ours @ theirs.mT) * a_M[:, None] * b_N
    return sum_MN


def forward(x_MK: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
    """``y_MN = x W^T`` in the dtype of ``x``."""
    return _product(x_MK, recipe.activation, weight_NK, recipe.weight)


def grad_input(grad_MN: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
    """``dx_MK = g W`` in the dtype of ``g``: a sum over N."""
    return _product(grad_MN, recipe.gradient, weight_NK.mT, recipe.weight)


def grad_weight(grad_MN: Tensor, x_MK: Tensor, recipe: Recipe) -> Tensor:
    """``dW_NK = g^T x`` in the dtype of ``g``: a sum over M."""
    return _product(grad_MN.mT, recipe.gradient, x_MK.mT, recipe.activation)


def round_to_grid(x: Tensor, how: Operand) -> Tensor:
    """What is left of ``x`` [.., K] after quantising its rows, in its own dtype.

    With scales that are powers of two nothing is lost when it is quantised again in the same tiles. For that
    to be so it never becomes infinite: the largest magnitude is that of the grid within the dtype.
    """
    eps = torch.finfo(FORMATS[how.format]).eps
    _, exponent = math.frexp(min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max))
    largest = math.ldexp(1 - eps / 2, exponent)
    rounded = dequantise(quantise(x.reshape(-1, x.shape[-1]), how)).clamp_(-largest, largest)
    return rounded.to(x.dtype).view(x.shape)


def _product(a: Tensor, how_a: Operand | None, b: Tensor, how_b: Operand | None) -> Tensor:
    if how_a is None or how_b is None:
        return a @ b.to(a.dtype).mT
    return multiply(quantise(a, how_a), quantise(b, how_b), a.dtype)


def _scales(magnitude: Tensor, largest: float, beyond: float, *, power_of_two: bool) -> Tensor:
    # torch.div of two tensors: ``largest / tensor`` multiplies by a reciprocal, which is off by one in the last place
    scales = torch.div(torch.full_like(magnitude, largest), magnitude)
    scales = torch.where(scales.isinf(), beyond, scales)
    scales = torch.where((magnitude == 0) | magnitude.isinf(), 1.0, scales)
    if power_of_two:
        scales = (scales.view(torch.int32) & 0x7F800000).view(torch.float32)  # exponent alone
    return scales


def _scales_of_column(x: Quantised, column: int) -> Tensor:
    return x.inverse_scales[:, column // x.tile[1]].repeat_interleave(x.tile[0])[: len(x.values_MK)]


def _whole(x_MK: Tensor) -> tuple[int, int]:
    rows, columns = x_MK.shape
    return max(rows, 1), max(columns, 1)
