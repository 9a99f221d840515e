"""FP8 in plain Python numbers: the 256 values of a format written down one by one, and the nearest found by search.

Shares nothing with ``precision.reference``: no torch, no vector arithmetic. What float32 arithmetic gives is
computed in float64 and rounded once, which for one product or quotient of float32 numbers is the same.
"""

import math
import struct
from bisect import bisect_left
from functools import cache

__all__ = ["FLOAT32_MAX", "largest", "quantise", "rounded", "value_of"]

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_BITS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}  # of exponent and mantissa, and the bias


def value_of(code: int, format: str) -> float:
    """The number that a byte stands for."""
    exponent_bits, mantissa_bits, bias = _BITS[format]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (2**mantissa_bits - 1)
    if exponent == 2**exponent_bits - 1:
        if format == "e5m2":  # as IEEE 754 has it
            return sign * math.inf if mantissa == 0 else math.nan
        if mantissa == 2**mantissa_bits - 1:  # E4M3 gives up infinities for one more binade
            return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@cache
def _finite(format: str) -> list[float]:
    """Those from zero up; their position is their code."""
    values = [value_of(code, format) for code in range(128)]
    return [value for value in values if math.isfinite(value)]


def largest(format: str) -> float:
    return _finite(format)[-1]


def rounded(x: float, format: str) -> int:
    """The code of what is nearest, of two equally near ones the even; beyond the largest: the largest."""
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    if math.isnan(x):
        return sign | 0x7F
    values, magnitude = _finite(format), abs(x)
    above = bisect_left(values, magnitude)
    if above == len(values):
        return sign | (above - 1)
    if above == 0 or values[above] == magnitude:
        return sign | above
    middle = (values[above - 1] + values[above]) / 2
    if magnitude == middle:
        return sign | (above if above % 2 == 0 else above - 1)
    return sign | (above if magnitude > middle else above - 1)


def quantise(
    rows: list[list[float]],
    format: str,
    tile: tuple[int, int] | None,
    *,
    power_of_two: bool,
    beyond: float = FLOAT32_MAX,
) -> tuple[list[list[int]], list[list[float]]]:
    """Codes, and the inverse scale of each tile.

    Args:
        rows: numbers that float32 can hold.
        beyond: what a scale is that is too large for float32.
    """
    height, width = tile or (len(rows), len(rows[0]))
    codes = [[0] * len(row) for row in rows]
    inverses: list[list[float]] = []
    for top in range(0, len(rows), height):
        inverses.append([])
        for left in range(0, len(rows[0]), width):
            places = [
                (i, j)
                for i in range(top, min(top + height, len(rows)))
                for j in range(left, min(left + width, len(rows[0])))
            ]
            scale = _scale([rows[i][j] for i, j in places], largest(format), beyond, power_of_two=power_of_two)
            for i, j in places:
                codes[i][j] = rounded(_float32(rows[i][j] * scale), format)
            inverses[-1].append(_float32(1 / scale))
    return codes, inverses


def _scale(values: list[float], top: float, beyond: float, *, power_of_two: bool) -> float:
    magnitude = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    if magnitude == 0 or math.isinf(magnitude):
        return 1.0
    scale = _float32(top / magnitude)
    if math.isinf(scale):
        scale = beyond
    return 2.0 ** (math.frexp(scale)[1] - 1) if power_of_two else scale


def _float32(x: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)
