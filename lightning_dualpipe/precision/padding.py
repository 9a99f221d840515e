"""Rows of zeros behind each expert's own, for kernels that take multiples of so many rows only.

    rows of expert 0 │ of 1 │ of 2    ──pad_rows──►    rows of 0, zeros │ of 1 │ of 2, zeros
                                      ◄─unpad_rows──

FP8 kernels want 16 rows (TMA loads of 16 bytes along the tokens), MXFP8's 32. Who pads is the grouped
matmul that needs it: routers, dispatchers and their statistics never see a row that is no token. Zeros
change no product: they have no say in a scale, and add nothing to the gradient of a weight. No tile is
wider than 128 rows, so padding to a divisor of that begins no new one either.

Padding and taking away are each other's transpose, so one is the backward of the other. An expert
without rows stays without.

Shapes: R rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["pad_rows", "padded_counts", "unpad_rows"]


def padded_counts(counts: Sequence[int], multiple: int) -> list[int]:
    """Each count rounded up to a multiple."""
    assert multiple > 0 and all(count >= 0 for count in counts), f"{counts} to multiples of {multiple}"
    return [-(-count // multiple) * multiple for count in counts]


def pad_rows(x_RD: Tensor, counts: Sequence[int], multiple: int) -> tuple[Tensor, list[int]]:
    """Rows with zeros behind those of each expert, and how many each has then.

    ``counts`` add up to R. What is a multiple already comes back as it is, not copied.
    """
    padded = padded_counts(counts, multiple)
    assert len(x_RD) == sum(counts), f"counts add up to {sum(counts)}, there are {len(x_RD)} rows"
    if padded == list(counts):
        return x_RD, padded
    return _Pad.apply(x_RD, tuple(counts), tuple(padded)), padded


def unpad_rows(y_RD: Tensor, counts: Sequence[int], multiple: int) -> Tensor:
    """The rows without those that ``pad_rows`` has put behind them."""
    padded = padded_counts(counts, multiple)
    assert len(y_RD) == sum(padded), f"{counts} were padded to {sum(padded)} rows, there are {len(y_RD)}"
    if padded == list(counts):
        return y_RD
    unpadded: Tensor = _Unpad.apply(y_RD, tuple(counts), tuple(padded))
    return unpadded


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts: tuple[int, ...], padded: tuple[int, ...]) -> Tensor:
        ctx.counts, ctx.padded = counts, padded
        return _with_zeros(x_RD, counts, padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _without(grad, ctx.counts, ctx.padded), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, counts: tuple[int, ...], padded: tuple[int, ...]) -> Tensor:
        ctx.counts, ctx.padded = counts, padded
        return _without(y_RD, counts, padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _with_zeros(grad, ctx.counts, ctx.padded), None, None


# One concatenation each: its pieces are known on the host, so nobody waits for the device.


def _with_zeros(x_RD: Tensor, counts: tuple[int, ...], padded: tuple[int, ...]) -> Tensor:
    missing = [wide - count for count, wide in zip(counts, padded, strict=True)]
    zeros = x_RD.new_zeros(max(missing), *x_RD.shape[1:])
    parts = [part for rows, more in zip(x_RD.split(counts), missing, strict=True) for part in (rows, zeros[:more])]
    return torch.cat(parts)


def _without(y_RD: Tensor, counts: tuple[int, ...], padded: tuple[int, ...]) -> Tensor:
    return torch.cat([rows[:count] for rows, count in zip(y_RD.split(padded), counts, strict=True)])
