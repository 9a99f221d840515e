"""One stage of the model on this rank, and the microbatches it is still holding.

    forward          keeps the graph, returns what the next stage receives (the last: its sums)
    backward         consumes the graph, returns the gradients for the previous stage
    backward_input   the same, but weight gradients that can wait are put aside
    backward_weight  computes what the backward_input of that microbatch put aside

``backward = backward_input; backward_weight``. Layers that cannot postpone their weight gradient
(norms, embeddings, foreign autograd functions) compute it in ``backward_input``; that is always right.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dualpipe.interface import Batch, Layer, PipelineModel, Values, WeightGradients

__all__ = ["Stage"]


@dataclass(slots=True)
class Stage:
    """``layers`` of ``model`` on this rank; ``context`` wraps every forward (autocast, FP8)."""

    index: int
    num_stages: int
    model: PipelineModel
    layers: Sequence[Layer]
    weight_gradients: WeightGradients
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    _graphs: dict[int, tuple[Values, Values]] = field(default_factory=dict)
    _postponed: dict[int, int] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    @property
    def num_held(self) -> int:
        """Microbatches whose graph is alive."""
        return len(self._graphs)

    def predict(self, values: Values, batch: Batch) -> Values:
        """Values of the stage's last layer; no graph is kept."""
        with self.context():
            return self._run(self._inputs(values, batch), batch, with_loss=False)

    def evaluate(self, values: Values, batch: Batch) -> Values | dict[str, Tensor]:
        """As ``forward``, for a microbatch that has no backward."""
        with self.context():
            values = self._run(self._inputs(values, batch), batch, with_loss=True)
            return dict(self.model.loss(values, batch)) if self.is_last else values

    def forward(self, microbatch: int, values: Values, batch: Batch) -> Values | dict[str, Tensor]:
        """Detached values for the next stage; on the last stage the model's sums, detached."""
        inputs = self._inputs(values, batch)
        if not self.is_first:
            inputs = tuple(_leaf(value) for value in inputs)
        with self.context():
            outputs = self._run(tuple(_enter(value) for value in inputs), batch, with_loss=True)
            sums = dict(self.model.loss(outputs, batch)) if self.is_last else None
        if sums is not None:
            self._graphs[microbatch] = (inputs, (sums["loss"],))
            return {name: value.detach() for name, value in sums.items()}
        self._graphs[microbatch] = (inputs, outputs)
        return tuple(output.detach() for output in outputs)

    def backward(self, microbatch: int, gradients: Values | None) -> Values:
        """``gradients`` belong to the floating-point outputs; None on the last stage: its loss sum has gradient 1."""
        inputs, outputs = self._graphs.pop(microbatch)
        floating = [output for output in outputs if output.is_floating_point()]
        if gradients is None:
            gradients = tuple(torch.ones_like(output) for output in floating)
        wanted = [(y, g.to(y.dtype)) for y, g in zip(floating, gradients, strict=True) if y.requires_grad]
        if wanted:  # nothing to do where everything up to here is frozen
            roots, seeds = zip(*wanted, strict=True)
            with torch.autocast(roots[0].device.type, enabled=False):
                torch.autograd.backward(roots, seeds)
        return () if self.is_first else tuple(_gradient(x) for x in inputs if x.is_floating_point())

    def backward_input(self, microbatch: int, gradients: Values | None) -> Values:
        waiting = len(self.weight_gradients)
        self.weight_gradients.deferring = True
        try:
            return self.backward(microbatch, gradients)
        finally:
            self.weight_gradients.deferring = False
            self._postponed[microbatch] = len(self.weight_gradients) - waiting

    @torch.no_grad()  # runs outside the autograd engine: a gradient must not carry a graph
    def backward_weight(self, microbatch: int) -> None:
        self.weight_gradients.run(self._postponed.pop(microbatch))

    def _inputs(self, values: Values, batch: Batch) -> Values:
        if not self.is_first:
            return values
        first = self.model.inputs(batch)
        return first if isinstance(first, tuple) else (first,)

    def _run(self, values: Values, batch: Batch, *, with_loss: bool) -> Values:
        for layer in self.layers:
            if with_loss or not layer.for_loss:
                values = layer(values, batch)
        return values


def _enter(value: Tensor) -> Tensor:
    """What the first layer is called with: the same values, but, unlike a leaf, it may change them in place."""
    return _Entry.apply(value) if value.is_leaf and value.requires_grad else value


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _leaf(value: Tensor) -> Tensor:
    leaf = value.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def _gradient(leaf: Tensor) -> Tensor:
    """Zeros where the stage did not use its input, so that every boundary always carries the same tensors."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
