"""Matrices of Hugging Face directories in FP8, as DeepSeek released them.

    <key>              E4M3     [R, C]
    <key>_scale_inv    float32  [ceil(R / 128), ceil(C / 128)]      weight = value * scale_inv of its block

Blocks at the edges are smaller: ``kv_a_proj_with_mqa`` has 576 rows, four and a half blocks. In FP8 are the
projections of attention and of all feed-forward networks, experts one by one; embedding, head, norms, router,
biases and ``eh_proj`` are not (technical report, section 3.3.2, and the released index).

Values and scales are those of ``precision.reference``, with one exception. Weights that came from FP8 files go
back as they came: a block that some scale reproduces to the last bit gets that scale. Scales computed anew from
such weights are off by one or two units in the last place for 30 % of all float32 scales, and a block whose
scale was a power of two would be rounded again.

Shapes: R rows, C columns of a matrix; P, Q blocks of 128 rows and of 128 columns.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.recipe import Operand
from lightning_dualpipe.precision.reference import FORMATS, Quantised, quantise
from lightning_dualpipe.precision.reference import dequantise as dequantise_tiles

__all__ = [
    "QUANTIZATION_CONFIG",
    "WEIGHT_OPERANDS",
    "dequantise",
    "is_in_fp8",
    "is_misread_by_transformers",
    "quantise_weight",
    "scale_key",
    "scale_shape",
]

_BLOCK = 128
WEIGHT_OPERANDS: Mapping[str, Operand] = {
    "float8_block": Operand("e4m3", (_BLOCK, _BLOCK)),
    "float8_block_power_of_two": Operand("e4m3", (_BLOCK, _BLOCK), "power_of_two"),
}
"""How weights are quantised, by the ``dtype`` that files are written in."""
QUANTIZATION_CONFIG: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [_BLOCK, _BLOCK],
}
"""What ``config.json`` says of such files."""
_IN_FP8 = re.compile(r"\.(?:self_attn|mlp)\.(?:.+\.)?\w+_proj(?:_with_mqa)?\.weight$")
_ROWS_AT_ONCE = 8 * _BLOCK
_SAMPLED = 16  # one row in so many
_HARDLY = 2.0**-21  # of a weight: more than scales two units apart make, far less than rounding to FP8


def is_in_fp8(key: str) -> bool:
    """Whether the released files hold the tensor ``key`` in FP8."""
    return _IN_FP8.search(key) is not None


def scale_key(key: str) -> str:
    return f"{key}_scale_inv"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (_BLOCK, _BLOCK)) -> tuple[int, ...]:
    """[P, Q] for a matrix [R, C]."""
    return tuple(-(-size // of) for size, of in zip(shape, block, strict=False))


def is_misread_by_transformers(shape: tuple[int, ...]) -> bool:
    """Whether transformers (5.23) takes the blocks for smaller ones, and the weights it reads are others.

    It divides the size by the number of blocks. Where that leaves a remainder, it refuses.
    """
    sizes = list(zip(shape, scale_shape(shape), strict=True))
    divides = all(size % blocks == 0 for size, blocks in sizes)
    return divides and any(blocks > 1 and size % _BLOCK for size, blocks in sizes)


def quantise_weight(key: str, weight_RC: Tensor, how: Operand) -> tuple[Tensor, Tensor]:
    """Values, E4M3 [R, C], and their inverse scales, float32 [P, Q], on the device of ``weight_RC``.

    Memory: the result, and a few times 1,024 rows in float32.

    Raises:
        ConfigurationError: numbers that are NaN or infinite in float32, named by ``key``.
    """
    values_RC = torch.empty_like(weight_RC, dtype=FORMATS[how.format], memory_format=torch.contiguous_format)
    scales: list[Tensor] = []
    for part_RC, band_RC in zip(values_RC.split(_ROWS_AT_ONCE), _bands(key, weight_RC), strict=True):
        band = _quantise(band_RC, how)
        part_RC.copy_(band.values_MK)
        scales.append(band.inverse_scales)
    return values_RC, torch.cat(scales)


def dequantise(values_RC: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """``values * scale`` of the block [R // block[0], C // block[1]] they lie in, float32 [R, C]."""
    weights_RC = values_RC.float()
    for band, scales_of_band in zip(weights_RC.split(block[0]), scales.float(), strict=True):
        band *= scales_of_band.repeat_interleave(block[1])[: weights_RC.shape[1]]
    return weights_RC


def _bands(key: str, weight_RC: Tensor) -> Iterator[Tensor]:
    """A few rows at a time, in float32."""
    for number, band_RC in enumerate(weight_RC.detach().split(_ROWS_AT_ONCE)):
        band_RC = band_RC.float()
        if band_RC.numel() and not torch.stack(band_RC.aminmax()).isfinite().all():
            row, column = (~band_RC.isfinite()).nonzero()[0].tolist()
            raise ConfigurationError(
                f"{key} holds {float(band_RC[row, column])} in row {number * _ROWS_AT_ONCE + row}, column {column}, "
                "and so has no scale; export an earlier checkpoint, whose weights are finite "
                "(dtype='float32' writes this one as it is)"
            )
        yield band_RC


def _quantise(weight_RC: Tensor, how: Operand) -> Quantised:
    """``reference.quantise``, but exact where that is possible."""
    chosen = quantise(weight_RC, how)
    if how.scales == "power_of_two" or not _may_be_exact(weight_RC, chosen):
        return chosen
    off_PQ = _any_in_block(dequantise_tiles(chosen) != weight_RC)
    for other in _alternatives(weight_RC, chosen, how):
        if not off_PQ.any():
            break
        better_PQ = off_PQ & ~_any_in_block(dequantise_tiles(other) != weight_RC)
        better_RC = better_PQ.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
        better_RC = better_RC[: weight_RC.shape[0], : weight_RC.shape[1]]
        # as bytes: there is no torch.where of FP8
        values = torch.where(better_RC, other.values_MK.view(torch.uint8), chosen.values_MK.view(torch.uint8))
        scales = torch.where(better_PQ, other.inverse_scales, chosen.inverse_scales)
        chosen = Quantised(values.view(chosen.values_MK.dtype), scales, chosen.tile)
        off_PQ &= ~better_PQ
    return chosen


def _may_be_exact(weight_RC: Tensor, chosen: Quantised) -> bool:
    """False of trained weights, for which a few rows of each block suffice."""
    some_RC = weight_RC[::_SAMPLED]
    scales_RC = chosen.inverse_scales.repeat_interleave(_BLOCK // _SAMPLED, 0)[: len(some_RC)]
    scales_RC = scales_RC.repeat_interleave(_BLOCK, 1)[:, : some_RC.shape[1]]
    off_RC = (chosen.values_MK[::_SAMPLED].float() * scales_RC - some_RC).abs() > some_RC.abs() * _HARDLY
    powers_RC = (scales_RC.reciprocal().view(torch.int32) & 0x7F800000).view(torch.float32).reciprocal()
    off_too_RC = (some_RC / powers_RC).to(chosen.values_MK.dtype).float() * powers_RC != some_RC
    return not all(_any_in_block(off, _BLOCK // _SAMPLED).all() for off in (off_RC, off_too_RC))


def _alternatives(weight_RC: Tensor, chosen: Quantised, how: Operand) -> Iterator[Quantised]:
    """Values and scales that weights in FP8 files may have had."""
    bits_PQ = chosen.inverse_scales.view(torch.int32)
    for units in (1, -1, 2, -2):
        yield replace(chosen, inverse_scales=(bits_PQ + units).view(torch.float32))
    yield quantise(weight_RC, replace(how, scales="power_of_two"))


def _any_in_block(where_RC: Tensor, rows: int = _BLOCK) -> Tensor:
    """[P, Q]: of each block, of which ``rows`` rows are there."""
    padded = F.pad(where_RC, (0, -where_RC.shape[1] % _BLOCK, 0, -where_RC.shape[0] % rows))
    return padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, rows)).any(3).any(1)
