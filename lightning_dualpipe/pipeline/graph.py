"""A piece of autograd that a pipeline runs backward by hand.

    values ──enter──► inputs ──phases──► outputs ──detached──► values of the next piece
    gradients of inputs ◄────backward──── gradients of outputs

Nothing is kept but what autograd saves: of the outputs only the place in the graph where their
gradients enter, and of the inputs only the one where they leave. So what an output holds is freed with
its last user, and if that is another rank, as soon as it is sent; and an input that no backward needs is
freed with the phase that used it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_dualpipe.interface import Values

__all__ = ["Entrance", "Graph", "detached"]


@dataclass(slots=True)
class Entrance:
    """Where the inputs of a graph come in, and their gradients out."""

    floating: list[bool] = field(default_factory=list)
    like: list[Tensor] = field(default_factory=list)  # of each floating input its shape, without its memory
    gradients: list[Tensor] = field(default_factory=list)

    def enter(self, values: Values) -> Values:
        """The same numbers at the beginning of a graph."""
        self.floating = [_is_floating(value) for value in values]
        mine = [value for value in values if _is_floating(value)]
        self.like = [value.new_empty(()).expand(value.shape) for value in mine]
        entered = iter(_Enter.apply(self.gradients, torch.empty(0, requires_grad=True), *mine) if mine else ())
        return tuple(next(entered) if floats else value for value, floats in zip(values, self.floating, strict=True))

    def leave(self) -> Values:
        """One gradient per input, None for one that is no floating-point tensor.

        Zeros where an input was not used, so that every boundary always carries the same tensors.
        """
        given = iter(self.gradients or [torch.zeros_like(each, memory_format=_DENSE) for each in self.like])
        return tuple(next(given) if floats else None for floats in self.floating)


_DENSE = torch.contiguous_format


class _Enter(torch.autograd.Function):
    """Identity. A leaf would be kept by its own node of the graph, with all it holds."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], anchor: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(value.detach() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.gradients.extend(gradients)
        return (None,) * (2 + len(gradients))


@dataclass(frozen=True, slots=True)
class Graph:
    """What was computed from the values that came in at an entrance; None: nobody wants their gradients."""

    entrance: Entrance | None
    roots: tuple[_Root, ...]

    @classmethod
    def of(cls, entrance: Entrance | None, outputs: Sequence[Any]) -> Graph:
        return cls(entrance, tuple(map(_root, outputs)))

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
        return self.entrance.leave() if self.entrance is not None else ()


class _Root(NamedTuple):
    edge: GradientEdge | None  # None: needs no gradient
    dtype: torch.dtype | None  # None: cannot have one
    device: torch.device | None


def _root(value: Any) -> _Root:
    if not _is_floating(value):
        return _Root(None, None, None)
    return _Root(get_gradient_edge(value) if value.requires_grad else None, value.dtype, value.device)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def detached(values: Values) -> Values:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
