"""Gradients in float32 of parameters in half precision.

bfloat16 has 8 significant bits: of a hundred equal microbatch gradients that are added up in it, the
last ones no longer change the sum. ``Tensor.grad_dtype`` makes autograd, and ``now_or_later``, add
up in float32; ``.grad`` is then float32, and so are its sums over ranks, its norm and its clipping.
What one microbatch adds still comes out of a matrix multiplication in half precision, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

__all__ = ["is_half", "keep_main_gradients"]


def is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def keep_main_gradients(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """From now on those in half precision have float32 gradients; returns a function that undoes it."""
    halves = [parameter for parameter in parameters if is_half(parameter)]
    for parameter in halves:
        _set(parameter, torch.float32)
    return partial(_undo, halves)


def _undo(halves: Iterable[nn.Parameter]) -> None:
    for parameter in halves:
        _set(parameter, parameter.dtype)


def _set(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    gradient, parameter.grad = parameter.grad, None  # torch refuses to change it under a gradient
    parameter.grad_dtype = dtype
    parameter.grad = None if gradient is None else gradient.to(dtype)
