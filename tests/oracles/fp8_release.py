"""The released FP8 format by definition: a number at a time, and in no words of the package's.

E4M3 is built from its bits, rounding is a search for the nearest of its numbers, and which tensors are in FP8
is the list of names of DeepSeek-V3's index. A block is scaled as DeepSeek's kernels do, by its largest
magnitude / 448.
"""

from bisect import bisect_left

import numpy as np
import torch
from torch import Tensor

__all__ = ["e4m3", "from_released_format", "released_tensors", "to_e4m3", "to_released_format"]

BLOCK = 128


def e4m3(code: int) -> float:
    """The number that a byte stands for: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


_MAGNITUDES = [e4m3(code) for code in range(127)]


def to_e4m3(x: float) -> int:
    """The byte of the nearest number; of two, the one with an even mantissa; beyond 448, 448."""
    sign, magnitude = 0x80 if np.signbit(x) else 0, abs(x)
    if magnitude >= 448:
        return sign | 126
    above = bisect_left(_MAGNITUDES, magnitude)
    if above == 0:
        return sign
    below = above - 1
    to_below, to_above = magnitude - _MAGNITUDES[below], _MAGNITUDES[above] - magnitude
    nearest = above if to_above < to_below or (to_above == to_below and above % 2 == 0) else below
    return sign | nearest


def to_released_format(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and float32 ``scale_inv`` of a matrix."""
    numbers = weight.float().numpy()
    rows, columns = numbers.shape
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for p in range(scales.shape[0]):
        for q in range(scales.shape[1]):
            block = numbers[p * BLOCK : (p + 1) * BLOCK, q * BLOCK : (q + 1) * BLOCK]
            scale = np.float32(np.abs(block).max()) / np.float32(448)
            scales[p, q] = scale
            for r, c in np.ndindex(block.shape):
                codes[p * BLOCK + r, q * BLOCK + c] = to_e4m3(float(block[r, c] / scale))
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)


def from_released_format(values: Tensor, scales: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """float32: each value times the scale of its block."""
    codes, factors = values.view(torch.uint8).numpy(), scales.float().numpy()
    numbers = np.zeros(codes.shape, np.float32)
    table = [np.float32(e4m3(code)) for code in range(256)]
    for r, c in np.ndindex(codes.shape):
        numbers[r, c] = table[codes[r, c]] * factors[r // block[0], c // block[1]]
    return torch.from_numpy(numbers)


_OUTSIDE = {
    "model.embed_tokens.weight": ("BF16", [129280, 7168]),
    "model.norm.weight": ("BF16", [7168]),
    "lm_head.weight": ("BF16", [129280, 7168]),
}
_FP8, _BF16, _F32 = "F8_E4M3", "BF16", "F32"
_EVERY_LAYER = {
    "input_layernorm.weight": (_BF16, [7168]),
    "post_attention_layernorm.weight": (_BF16, [7168]),
    "self_attn.q_a_proj.weight": (_FP8, [1536, 7168]),
    "self_attn.q_a_proj.weight_scale_inv": (_F32, [12, 56]),
    "self_attn.q_a_layernorm.weight": (_BF16, [1536]),
    "self_attn.q_b_proj.weight": (_FP8, [24576, 1536]),
    "self_attn.q_b_proj.weight_scale_inv": (_F32, [192, 12]),
    "self_attn.kv_a_proj_with_mqa.weight": (_FP8, [576, 7168]),
    "self_attn.kv_a_proj_with_mqa.weight_scale_inv": (_F32, [5, 56]),
    "self_attn.kv_a_layernorm.weight": (_BF16, [512]),
    "self_attn.kv_b_proj.weight": (_FP8, [32768, 512]),
    "self_attn.kv_b_proj.weight_scale_inv": (_F32, [256, 4]),
    "self_attn.o_proj.weight": (_FP8, [7168, 16384]),
    "self_attn.o_proj.weight_scale_inv": (_F32, [56, 128]),
}
_PREDICTION = {
    "embed_tokens.weight": (_BF16, [129280, 7168]),
    "enorm.weight": (_BF16, [7168]),
    "hnorm.weight": (_BF16, [7168]),
    "eh_proj.weight": (_BF16, [7168, 14336]),
    "shared_head.norm.weight": (_BF16, [7168]),
    "shared_head.head.weight": (_BF16, [129280, 7168]),
}
_ROUTER = {
    "mlp.gate.weight": (_BF16, [256, 7168]),
    "mlp.gate.e_score_correction_bias": (_F32, [256]),
}


def _feed_forward(folder: str, width: int) -> dict[str, tuple[str, list[int]]]:
    blocks = width // BLOCK
    return {
        f"{folder}.gate_proj.weight": (_FP8, [width, 7168]),
        f"{folder}.gate_proj.weight_scale_inv": (_F32, [blocks, 56]),
        f"{folder}.up_proj.weight": (_FP8, [width, 7168]),
        f"{folder}.up_proj.weight_scale_inv": (_F32, [blocks, 56]),
        f"{folder}.down_proj.weight": (_FP8, [7168, width]),
        f"{folder}.down_proj.weight_scale_inv": (_F32, [56, blocks]),
    }


def released_tensors() -> dict[str, tuple[str, list[int]]]:
    """Dtype, as safetensors spells it, and shape of all 91,991 tensors of the released DeepSeek-V3."""
    tensors = dict(_OUTSIDE)
    for layer in range(62):
        inside = dict(_EVERY_LAYER)
        if layer < 3:
            inside |= _feed_forward("mlp", 18432)
        else:
            inside |= _ROUTER | _feed_forward("mlp.shared_experts", 2048)
            for expert in range(256):
                inside |= _feed_forward(f"mlp.experts.{expert}", 2048)
        if layer == 61:
            inside |= _PREDICTION
        tensors |= {f"model.layers.{layer}.{name}": what for name, what in inside.items()}
    return tensors
