"""Rows that travel in a narrow number format, and arrive with the bits they left with.

    x_RD ──encode──► values_RD, scales_RT ──► bytes_RB ══► ──► values_RD, scales_RT ──decode──► x_RD

Nothing is rounded here. Whoever gives a dispatcher a format promises that what it sends lies on the grid
of that format already: tokens on their way to experts, and in backward the gradients of what comes home,
both rounded once, before they are copied. So how rows travel has no say in any result. Sums, which is
what goes the other way, lie on no grid; they travel as they are (technical report, section 3.3.3:
dispatch in FP8, combine in BF16).

The scales are powers of two, so a byte holds the exponent of one.

Shapes: R rows, D width, T tiles of a row, B = D + T bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_dualpipe.interface import Flight, Values
from lightning_dualpipe.parallel.flight import used_here

__all__ = ["RowFormat", "from_bytes", "sent_in", "to_bytes", "with_gradients_in"]


class RowFormat(Protocol):
    """A number format of a byte a value, exact for the rows that lie on its grid. Never makes the host wait."""

    def encode(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """``values_RD``, of any type that takes a byte, and ``scales_RT``, powers of two from 2^-127 on in float32.

        Both are contiguous.
        """
        ...

    def decode(self, values_RD: Tensor, scales_RT: Tensor, dtype: torch.dtype) -> Tensor:
        """``x_RD``."""
        ...


def sent_in(row_format: RowFormat | None, rows: Tensor, launch: Callable[[Tensor], Flight]) -> Flight:
    """``launch(rows)``, whose first value travels in that format; its gradient travels as it is."""
    if row_format is None:
        return launch(rows)
    values_RD, scales_RT = row_format.encode(rows)
    flight = launch(to_bytes(values_RD, scales_RT))
    return _Encoded(flight, row_format, values_RD.dtype, rows.shape[1], rows.dtype, (rows,))


def with_gradients_in(row_format: RowFormat | None, flight: Flight) -> Flight:
    """``flight``, whose first value has a gradient that travels in that format."""
    return flight if row_format is None else _GradientsEncoded(flight, row_format)


def to_bytes(values_RD: Tensor, scales_RT: Tensor) -> Tensor:
    """``bytes_RB`` (uint8): the values of a row, and the exponents of its scales."""
    exponents_RT = scales_RT.view(torch.int32) >> _MANTISSA_BITS  # 2^-127 is denormal: exponent 0
    return torch.cat([values_RD.view(torch.uint8), exponents_RT.to(torch.uint8)], dim=1)


def from_bytes(bytes_RB: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``values_RD`` of that type, and ``scales_RT``."""
    values_RD, exponents_RT = bytes_RB[:, :width], bytes_RB[:, width:]
    scales_RT = (exponents_RT.to(torch.int32) << _MANTISSA_BITS).clamp_(min=1 << (_MANTISSA_BITS - 1))
    return values_RD.view(dtype), scales_RT.view(torch.float32)


_MANTISSA_BITS = 23


@dataclass(slots=True, eq=False)
class _Encoded:
    """An ``interface.Flight``, as the one below."""

    flight: Flight
    row_format: RowFormat
    values_dtype: torch.dtype
    width: int
    dtype: torch.dtype
    leaving: Values  # must live until they have been encoded, on the stream that launched this

    def land(self) -> Values:
        bytes_RB, *others = self.flight.land()
        used_here(*self.leaving)
        self.leaving = ()
        return self.row_format.decode(*from_bytes(bytes_RB, self.width, self.values_dtype), self.dtype), *others

    def back(self, gradients: Values) -> Flight:
        return self.flight.back(gradients)


@dataclass(slots=True, eq=False)
class _GradientsEncoded:
    flight: Flight
    row_format: RowFormat

    def land(self) -> Values:
        return self.flight.land()

    def back(self, gradients: Values) -> Flight:
        rows, *others = gradients
        return sent_in(self.row_format, rows, lambda written: self.flight.back((written, *others)))
