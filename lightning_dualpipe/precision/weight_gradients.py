"""What ``linear`` and ``grouped_linear`` share: weight gradients that wait, and autocast.

A weight gradient is needed by nobody before the optimizer, so a zero-bubble schedule computes it
when its rank would otherwise idle (arXiv:2401.10241; DeepSeek-V3 report, section 3.2.1). The layer
puts a closure into the queue of its stage; when it runs, it adds to ``.grad`` what autograd would
have added, bit for bit.

A parameter in half precision may have gradients in float32 (``grad_dtype``), so that those of many
microbatches add up without rounding after each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from lightning_dualpipe.interface import WeightGradients

__all__ = ["autocast_to", "check_dtypes", "gradient_dtype", "may_skip_autograd", "now_or_later", "without_autocast"]


def now_or_later(parameter: Tensor, queue: WeightGradients | None, compute: Callable[[], Tensor]) -> Tensor | None:
    """The gradient of ``parameter`` for autograd, or None if ``compute`` was put into the queue instead."""
    if queue is None or not (queue.deferring and may_skip_autograd(parameter)):
        return compute().to(gradient_dtype(parameter))
    queue.put(partial(_add_gradient, parameter, compute))
    return None


def may_skip_autograd(parameter: Tensor) -> bool:
    """A computed weight (a parametrization, for instance) must pass its gradient on, and a hook must see it."""
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.is_leaf and not hooks


@torch.no_grad()  # runs outside the autograd engine: without this the gradient would carry a graph
def _add_gradient(parameter: Tensor, compute: Callable[[], Tensor]) -> None:
    gradient = compute().to(gradient_dtype(parameter))
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Of ``parameter.grad``."""
    chosen = parameter.grad_dtype if parameter.is_leaf else None
    return chosen or parameter.dtype


def autocast_to(tensor: Tensor) -> Tensor:
    """``tensor`` in the number format that an enclosing ``torch.autocast`` wants for a matrix multiplication."""
    device = tensor.device.type
    if not _autocast_enabled(device) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def check_dtypes(x: Tensor, weight: Tensor) -> None:
    """As torch does, outside of autocast.

    Raises:
        RuntimeError: they differ.
    """
    if x.dtype != weight.dtype and not _autocast_enabled(x.device.type):
        raise RuntimeError(
            f"a layer whose weight is {weight.dtype} was given {x.dtype}; give it {weight.dtype}, as without FP8"
        )


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """For backwards: they keep the format of their forward, whatever surrounds them."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _autocast_enabled(device) else nullcontext()


def _autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
