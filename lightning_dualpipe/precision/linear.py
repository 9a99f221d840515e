"""``y = x W^T + b`` whose weight gradient can wait.

    grad_x = g W        at once: the stage before needs it
    grad_W = g^T x      at once, or put into a queue while ``queue.deferring``
    grad_b = sum g      with grad_W

The products are the ones that autograd computes for ``F.linear``, so the bits are the same.
Hooks of a parameter cannot see a gradient that skipped autograd; such a parameter never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.matmul import Matmul
from lightning_dualpipe.precision.weight_gradients import autocast_to, now_or_later, without_autocast

__all__ = ["give_back", "is_plain", "linear", "make_linears_deferrable", "plain_linears", "take_over"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, queue: WeightGradients | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, also under autocast; weight gradients wait while ``queue.deferring``."""
    if queue is None or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(autocast_to(x), weight, bias, queue)
    return y


def make_linears_deferrable(module: nn.Module, queue: WeightGradients) -> Callable[[], None]:
    """Let the weight gradients of ``module`` wait in ``queue``; returns a function that undoes it.

    Every plain ``nn.Linear`` (see ``is_plain``) gets a ``forward`` of its own, called through its hooks as
    before; names, classes and state dicts stay. Layers with an attribute ``weight_gradients`` get the queue.
    """
    linears = [layer for layer in plain_linears(module) if vars(layer).get("weight_gradients") is None]
    others = [layer for layer in module.modules() if hasattr(layer, "weight_gradients") and not is_plain(layer)]
    undoing = [take_over(layer) for layer in linears]
    undoing += [_set(layer, "weight_gradients", queue) for layer in (*linears, *others)]

    def undo() -> None:
        while undoing:
            undoing.pop()()

    return undo


def plain_linears(module: nn.Module) -> list[nn.Linear]:
    """The layers of ``module``, itself among them, that ``take_over`` takes."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) and is_plain(layer)]


def is_plain(layer: nn.Module) -> bool:
    """Whether it is an ``nn.Linear`` whose product we may compute.

    Not: subclasses, layers whose ``forward`` somebody else has replaced, and layers whose weight is not a
    parameter of its own (``weight_norm``, pruning, tensor subclasses).
    """
    if type(layer) is not nn.Linear or not (_is_taken(layer) or "forward" not in vars(layer)):
        return False
    bias = layer._parameters.get("bias")
    return type(layer._parameters.get("weight")) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)


def take_over(layer: nn.Linear, matmul: Matmul | None = None) -> Callable[[], None]:
    """Give ``layer`` a ``forward`` of ours, which multiplies by ``matmul``, if one is given; returns what undoes it."""
    undo_matmul = _set(layer, "matmul", matmul) if matmul is not None else None
    _let_nobody_pass(layer)
    undo_forward = _set(layer, "forward", partial(_forward, layer))

    def undo() -> None:
        undo_forward()
        if undo_matmul is not None:
            undo_matmul()
        _let_nobody_pass(layer)

    return undo


def give_back(layer: nn.Linear) -> None:
    """Take the matmul of a plain layer back: it multiplies in high precision again, and has its own ``forward``."""
    own = vars(layer)
    own.pop("matmul", None)
    _let_nobody_pass(layer)
    if own.get("weight_gradients") is None:
        own.pop("forward", None)


def _let_nobody_pass(layer: nn.Module) -> None:
    """Where a hook is registered nobody multiplies by the weight of a layer without calling it, as
    ``nn.TransformerEncoderLayer`` does in an evaluation. So one is, for as long as the layer has a matmul.
    """
    hooks = layer._forward_pre_hooks
    ours = [number for number, hook in hooks.items() if hook is _nothing]
    if "matmul" in vars(layer) and not ours:
        layer.register_forward_pre_hook(_nothing)
    elif "matmul" not in vars(layer):
        for number in ours:
            del hooks[number]


def _nothing(*_: object) -> None:
    pass


def _is_taken(layer: nn.Module) -> bool:
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:  # named as in nn.Linear
    own = vars(layer)
    matmul: Matmul = own.get("matmul", linear)
    return matmul(input, layer.weight, layer.bias, own.get("weight_gradients"))


def _set(layer: nn.Module, name: str, value: object) -> Callable[[], None]:
    """Set an attribute past ``nn.Module``; returns what sets it back."""
    own, missing = vars(layer), object()
    before = own.get(name, missing)
    own[name] = value

    def undo() -> None:
        if before is missing:
            own.pop(name, None)
        else:
            own[name] = before

    return undo


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, queue: WeightGradients) -> Tensor:
        # The weight is kept as it is and cast again in backward: a cast copy per microbatch would add up
        cast_weight = autocast_to(weight)
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.parameters = weight, bias  # the objects that own ``.grad``; a saved tensor may come back as a copy
        ctx.queue, ctx.cast = queue, cast_weight.dtype
        return F.linear(x, cast_weight, None if bias is None else autocast_to(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            with without_autocast(grad):
                grad_x = grad @ weight.to(ctx.cast)
        if needs_weight:
            grad_weight = now_or_later(ctx.parameters[0], ctx.queue, partial(_weight_gradient, grad, x))
        if needs_bias:
            grad_bias = now_or_later(ctx.parameters[1], ctx.queue, partial(_bias_gradient, grad))
        return grad_x, grad_weight, grad_bias, None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    with without_autocast(grad):
        return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def _bias_gradient(grad: Tensor) -> Tensor:
    with without_autocast(grad):
        return grad.reshape(-1, grad.shape[-1]).sum(0)
