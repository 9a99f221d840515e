"""A piece of autograd that a pipeline runs backward by hand.

    values ──detach──► inputs ──phases──► outputs ──detach──► values of the next piece
    gradients of inputs ◄────backward──── gradients of outputs

Of the outputs only the place in the graph is kept where their gradients enter: what they hold is freed
with their last user, and if that is another rank, as soon as it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_dualpipe.interface import Values

__all__ = ["Graph", "detached", "is_floating", "leaves"]


@dataclass(frozen=True, slots=True)
class Graph:
    """Inputs that are leaves, and the roots of what was computed from them."""

    inputs: Values
    roots: tuple[_Root, ...]

    @classmethod
    def of(cls, inputs: Values, outputs: Sequence[Any]) -> Graph:
        return cls(inputs, tuple(map(_root, outputs)))

    def seeds(self) -> Values:
        """Gradients of a sum: 1 for each floating-point output."""
        return tuple(
            torch.ones((), dtype=root.dtype, device=root.device) if root.dtype is not None else None
            for root in self.roots
        )

    def aligned(self, gradients: Values) -> Values:
        """Gradients of the floating-point outputs with None for each of the others in between."""
        given = iter(gradients)
        found = tuple(next(given) if root.dtype is not None else None for root in self.roots)
        assert next(given, None) is None, f"{len(gradients)} gradients for {len(self.roots)} outputs"
        return found

    def backward(self, gradients: Values) -> Values:
        """From one gradient per output, None where there is none, one per input. Adds to ``.grad`` of parameters."""
        pairs = [
            (root.edge, gradient.to(root.dtype))
            for root, gradient in zip(self.roots, gradients, strict=True)
            if root.edge is not None and gradient is not None
        ]
        if pairs:  # nothing to do where everything up to here is frozen
            edges, seeds = zip(*pairs, strict=True)
            with torch.autocast(seeds[0].device.type, enabled=False):
                torch.autograd.backward(edges, seeds)
        return tuple(_gradient(value) if is_floating(value) else None for value in self.inputs)


class _Root(NamedTuple):
    edge: GradientEdge | None  # None: needs no gradient
    dtype: torch.dtype | None  # None: cannot have one
    device: torch.device | None


def _root(value: Any) -> _Root:
    if not is_floating(value):
        return _Root(None, None, None)
    return _Root(get_gradient_edge(value) if value.requires_grad else None, value.dtype, value.device)


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def leaves(values: Values) -> Values:
    """The same numbers at the beginning of a graph."""
    return tuple(value.detach().requires_grad_() if is_floating(value) else value for value in values)


def detached(values: Values) -> Values:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)


def _gradient(leaf: Tensor) -> Tensor:
    """Zeros where an input was not used, so that every boundary always carries the same tensors."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
