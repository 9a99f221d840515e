"""Weights lent to a module of Transformer Engine for one call, and where their gradients go.

The module accumulates into a float32 ``main_grad`` (``fuse_wgrad_accumulation``), the only mode in which its
delayed gradients add up; without it ``backward_dw`` overwrites ``.grad`` (Transformer Engine issue 3437). What
``main_grad`` is, is decided when the backward arrives:

    with a queue, and float32 gradients    the parameter's ``.grad`` itself: no copy, no rounding, summed in the
                                           kernel; at once, or later while ``queue.deferring``
    otherwise                              a new tensor, which autograd is given: DDP, hooks and computed weights
                                           see what they always see

    forward     weight ──lend──► views in the same memory ──► module ──► y
    backward    weight ◄──────── end_backward ◄───────────── module ◄── begin_backward ◄── gradient of y
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.weight_gradients import gradient_dtype, may_skip_autograd

__all__ = ["LentWeight"]


class LentWeight:
    """One call of a module, and what becomes of its weight gradient.

    Args:
        module: with ``wgrad_store`` and ``backward_dw``, built to fuse and to delay.
        queue: of the layer's stage; None if nobody but autograd shall see gradients.
    """

    def __init__(self, module: Any, weight: Tensor, queue: WeightGradients | None) -> None:
        self._module, self._weight, self._queue = module, weight, queue
        self._loan: weakref.ref[_Loan] | None = None  # weak: the loan leads here, through what was lent
        self._main: Tensor | None = None
        self._in_place = self._waits = False

    def lend(self) -> tuple[Tensor, ...]:
        """The weight (of a stack, each expert's), in the same memory."""
        lent: tuple[Tensor, ...] = _Lend.apply(self._weight, self)
        return lent

    def watch(self, y: Tensor, lent: tuple[Tensor, ...]) -> None:
        """Before anything else is done with ``y``, which the module has computed with what was lent."""
        if y.requires_grad and self._weight.requires_grad:
            loan = _Loan(lent)
            self._loan = weakref.ref(loan)
            y.register_hook(lambda _: self._begin_backward(loan))

    def _begin_backward(self, loan: _Loan) -> None:
        weight, queue, store = self._weight, self._queue, self._module.wgrad_store
        main = self._gradient_in_place()
        self._in_place = main is not None
        self._main = main if main is not None else _zeros(weight)
        self._waits = self._in_place and queue is not None and queue.deferring
        assert store.context.empty(), _UNTAKEN
        (store.enable_delay_wgrad_compute if self._waits else store.disable_delay_wgrad_compute)()
        parts = self._main.unbind(0) if weight.dim() == 3 else (self._main,)
        for lent, part in zip(loan.lent, parts, strict=True):
            lent.main_grad = part  # type: ignore[attr-defined]

    def _gradient_in_place(self) -> Tensor | None:
        weight = self._weight
        if self._queue is None or not may_skip_autograd(weight) or gradient_dtype(weight) != torch.float32:
            return None
        if weight.grad is None:
            weight.grad = _zeros(weight)
        return weight.grad if weight.grad.is_contiguous() else None

    def _end_backward(self) -> Tensor | None:
        """The gradient for autograd, if it is not in ``.grad``, or on its way there."""
        loan = self._loan() if self._loan is not None else None
        assert loan is not None and self._main is not None, "the backward of a product runs before this"
        for lent in loan.lent:
            del lent.main_grad  # type: ignore[attr-defined]  # or the graph would hold a whole step's gradients
        main, self._main = self._main, None
        if self._waits:
            assert self._queue is not None
            self._queue.put(_Delayed(self._module, self._module.wgrad_store.context.get_nowait(), self._weight, main))
        assert self._module.wgrad_store.context.empty(), _UNTAKEN
        return None if self._in_place else main.to(gradient_dtype(self._weight))


_UNTAKEN = "a weight gradient was delayed and nobody has taken it"


class _Loan:
    """Keeps what was lent until its backward: a module of Transformer Engine remembers it weakly."""

    def __init__(self, lent: tuple[Tensor, ...]) -> None:
        self.lent = lent


class _Delayed:
    """A weight gradient that waits. It has what it needs: nobody's order, and no forgotten one, confuses it."""

    def __init__(self, module: Any, entry: Any, weight: Tensor, main: Tensor) -> None:
        self._module, self._entry, self._weight, self._main = module, entry, weight, main

    def __call__(self) -> None:
        assert self._weight.grad is self._main, "a gradient was replaced between a backward and its weight gradient"
        store = self._module.wgrad_store
        assert store.context.empty(), _UNTAKEN
        store.enable_delay_wgrad_compute()  # off, ``backward_dw`` would do nothing and say nothing
        store.context.put(self._entry)
        self._module.backward_dw()


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, use: LentWeight) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # there are none: they went to ``main_grad``
        ctx.use = use
        alias = weight.detach()
        return alias.unbind(0) if weight.dim() == 3 else (alias,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        """After the backward of the module, which is one of those that it waits for."""
        assert all(each is None for each in gradients), "Transformer Engine gave a gradient besides main_grad"
        return ctx.use._end_backward(), None


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
