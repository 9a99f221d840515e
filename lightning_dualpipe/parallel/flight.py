"""A flight with nothing to do on the way: launched, waited for, and the same back in the backward.

    launch(*values) ──► flight.land()          forward
    flight.back(gradients).land()              backward

What a pipeline does in pieces, with other work in between, autograd does here in one go. This is what
a communicating phase computes, and what its pieces are tested against.

On a GPU a flight is launched from one stream and lands on another. Memory goes back to the stream it
was made on, which takes it for something else at once, whatever the other stream has still to do with
it. So of what is launched nothing may be freed before it has landed, and what lands is ``used_here``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dualpipe.interface import Flight, Values

__all__ = ["fly", "used_here"]


def used_here(*tensors: Tensor) -> None:
    """Tell the allocator that the current stream works on them too, wherever their memory came from."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def fly(launch: Callable[..., Flight], *values: Any) -> Values:
    """``launch(*values).land()``, differentiable.

    Where gradients are recorded, the result always requires one: if autograd left out the backward of one
    rank, because there nothing needs a gradient, the others would wait for it for ever.
    """
    anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    landed: Values = _Fly.apply(launch, anchor, *values)
    return landed


class _Fly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, launch: Callable[..., Flight], anchor: Tensor, *values: Any) -> Values:
        ctx.flight = launch(*values)
        return ctx.flight.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.flight.back(gradients).land()
