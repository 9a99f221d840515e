"""Rotary position embedding, plain or stretched by YaRN.

Position t turns the j-th pair of the R rotary dimensions by t * frequency_j (technical report, eq. 3
and 7; arXiv:2104.09864):

    (a, b)  ->  (a cos - b sin,  a sin + b cos)        a pair is a complex number, turning is a product

Pairs are neighbours (x0, x1), (x2, x3), ... as in the released weights, or with ``rope_interleave``
off halves (x0, xR/2), ... Queries and keys are turned alike, so only the pairing matters.

YaRN (arXiv:2309.00071) divides slow frequencies by ``factor``, keeps fast ones and ramps between, as
transformers reads its settings; the softmax scale takes the square of ``mscale``.

Tables are computed in float64 when first needed and kept per device and precision. They are no
buffers: nothing casts them, and a model built on the meta device needs no care.

Shapes: T positions, R rotary dimensions; a ``turn_TJ`` is complex with J = R / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config, YarnConfig

__all__ = ["Rotary", "frequencies", "softmax_scale"]


class Rotary:
    """Turns queries and keys; one object serves all layers of a model."""

    def __init__(self, config: DeepSeekV3Config) -> None:
        self._config = config
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [..., T, heads, R], position t at index t; same shape and dtype.

        Computed in at least float32, as in DeepSeek's own code.
        """
        return self._turned(x, self._table(x.shape[-3], x.device, _wide(x.dtype)))

    def at(self, x: Tensor, positions: Tensor, limit: int) -> Tensor:
        """``x`` [..., T, heads, R] with the position of each index in ``positions`` [..., T], all below ``limit``."""
        return self._turned(x, self._table(limit, x.device, _wide(x.dtype))[positions])

    def _turned(self, x: Tensor, turn_TJ: Tensor) -> Tensor:
        return self._pairs_to_real(self._pairs(x.to(_wide(x.dtype))) * turn_TJ.unsqueeze(-2)).to(x.dtype)

    def _pairs(self, x: Tensor) -> Tensor:
        if self._config.rope_interleave:
            return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.complex(*x.chunk(2, dim=-1))

    def _pairs_to_real(self, pairs: Tensor) -> Tensor:
        if self._config.rope_interleave:
            return torch.view_as_real(pairs).flatten(-2)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    def _table(self, num_positions: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``turn_TJ`` for positions 0 .. T-1: a view of a table that doubles when it grows."""
        table = self._tables.get((device, dtype))
        if table is None or len(table) < num_positions:
            with torch.inference_mode(False), torch.no_grad():  # a table made in inference could not be trained with
                table = _turns(self._config, 1 << max(num_positions - 1, 0).bit_length())
                table = self._tables[device, dtype] = table.to(device=device, dtype=dtype.to_complex())
        return table[:num_positions]

    def __getstate__(self) -> dict[str, object]:
        return {"_config": self._config, "_tables": {}}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def frequencies(config: DeepSeekV3Config) -> Tensor:
    """Radians per position of each pair, [R / 2] float64."""
    width = config.qk_rope_head_dim
    plain = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    if config.rope_scaling is None:
        return plain
    kept = 1 - _ramp(config.rope_scaling, width, config.rope_theta)
    return plain * kept + plain / config.rope_scaling.factor * (1 - kept)


def softmax_scale(config: DeepSeekV3Config) -> float:
    """What multiplies queries times keys: 1 / sqrt(width), times mscale^2 under YaRN."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    return scale if yarn is None or not yarn.mscale_all_dim else scale * _mscale(yarn, yarn.mscale_all_dim) ** 2


def _turns(config: DeepSeekV3Config, num_positions: int) -> Tensor:
    angle_TJ = torch.outer(torch.arange(num_positions, dtype=torch.float64, device="cpu"), frequencies(config))
    return torch.polar(torch.full_like(angle_TJ, _length(config.rope_scaling)), angle_TJ)


def _length(yarn: YarnConfig | None) -> float:
    """What multiplies cosine and sine; 1 where both mscales agree, as in the released weights."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn, yarn.mscale) / _mscale(yarn, yarn.mscale_all_dim)
    return _mscale(yarn, 1.0)


def _mscale(yarn: YarnConfig, weight: float) -> float:
    return 0.1 * weight * math.log(yarn.factor) + 1.0


def _ramp(yarn: YarnConfig, width: int, theta: float) -> Tensor:
    """0 for pairs that keep their frequency, 1 for those divided by the factor, [width / 2]."""

    def pair_that_turns(times: float) -> float:
        turns_per_radian = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(turns_per_radian) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001
    return ((torch.arange(width // 2, dtype=torch.float64, device="cpu") - low) / span).clamp(0, 1)
