"""What a model shows so that a pipeline can cut it.

    inputs(batch) ─► layers()[0] ─► layers()[1] ─► … ─► layers()[-1] ─► loss(values, batch)
                                 ║              ║
                     a pipeline may cut here, and send what ``boundary(batch)`` declares

Model code stays single-device: ``run_uncut`` is the definition, and a pipeline computes the same
numbers. Only the standard library is imported here; torch types appear in annotations alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning_dualpipe.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "Batch",
    "InitializesWeights",
    "Layer",
    "Phase",
    "PipelineModel",
    "ReplicaAware",
    "TensorSpec",
    "Values",
    "WeightGradients",
    "as_layers",
    "means",
    "only_the_loss_carries_gradients",
    "run_uncut",
]

Batch = Mapping[str, "Tensor"]
"""Tensors by name; samples are dimension 0 of each."""
Values = tuple[Any, ...]
"""What one phase hands to the next: tensors, and between the phases of one layer also opaque handles."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape of a tensor that crosses a cut.

    ``dtype=None`` means the dtype of the model's parameters.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A piece of a layer that is all compute or all communication."""

    name: str
    run: Callable[..., Any]  # (*values) -> a tensor or a tuple
    communicates: bool = False
    takes_batch: bool = False  # run(*values, batch=batch)

    def __call__(self, values: Values, batch: Batch) -> Values:
        out = self.run(*values, batch=batch) if self.takes_batch else self.run(*values)
        return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of the list a pipeline cuts; its forward is the composition of its phases.

    ``modules`` are the submodules whose parameters the phases use. A module named by two layers is
    shared: every rank that holds one of them keeps it, and its gradients are summed.
    """

    name: str
    phases: tuple[Phase, ...]
    modules: tuple[nn.Module, ...]
    cost: float  # forward time in any unit, relative to the other layers
    with_previous: bool = False  # never cut between this layer and the one before
    for_loss: bool = False  # skipped where there are no labels

    def __call__(self, values: Values, batch: Batch) -> Values:
        for phase in self.phases:
            values = phase(values, batch)
        return values


@runtime_checkable
class PipelineModel(Protocol):
    """An ``nn.Module`` that a pipeline can cut. Its ``forward(batch)`` is ``run_uncut(self, batch)``."""

    def layers(self) -> Sequence[Layer | nn.Module]:
        """The model in order. A plain module is called with the values of the entry before it."""
        ...

    def inputs(self, batch: Batch) -> Tensor | Values:
        """What the first layer receives."""
        ...

    def boundary(self, batch: Batch) -> Sequence[TensorSpec]:
        """The tensors that pass from any layer to the next, for this batch (a microbatch)."""
        ...

    def loss(self, values: Values, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the tokens of ``batch``, from the values of the last layer: ``"loss"``, which is
        differentiated; ``"tokens"``, how many tokens it sums over; and any other sums to report.

        Reported are the means: each sum over all microbatches and data ranks / all ``"tokens"``.
        """
        ...


@runtime_checkable
class InitializesWeights(Protocol):
    """A model whose initial weights are a function of (seed, parameter name).

    It may be built on the meta device; after it has been cut, what is left gets memory and
    ``initialize_weights`` is called.
    """

    def initialize_weights(self) -> None: ...


@runtime_checkable
class ReplicaAware(Protocol):
    """A strategy under which ranks hold different parts of a model, and losses are those of the global batch."""

    def sum_over_replicas(self, tensors: Mapping[str, Tensor]) -> None:
        """Sum each tensor, in place, over the ranks that hold the tensor of the LightningModule it is named after."""
        ...

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients of the whole model; the same on every rank."""
        ...

    def whole_tensors(self) -> Iterator[tuple[str, range | None, Tensor]]:
        """On rank 0 every tensor of the whole LightningModule, by name; spread ones in pieces with their rows.

        A collective: every rank iterates to the end.
        """
        ...


class WeightGradients:
    """The weight gradients of one stage that were split off from its backward and wait.

    A layer that can postpone its weight gradient has an attribute ``weight_gradients``, None until
    a pipeline sets it, and calls ``put`` during its backward.
    """

    def __init__(self) -> None:
        self.deferring = False
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, compute: Callable[[], None]) -> None:
        """Keep ``compute``, which adds to ``.grad``, for later."""
        self._waiting.append(compute)

    def run(self, count: int) -> None:
        """Compute the ``count`` that have waited longest."""
        for _ in range(count):
            self._waiting.popleft()()


def as_layers(entries: Iterable[Layer | nn.Module]) -> tuple[Layer, ...]:
    """Entries of ``PipelineModel.layers()``, a plain module being a layer of one phase."""
    return tuple(
        entry if isinstance(entry, Layer) else _layer_of(entry, name=str(index)) for index, entry in enumerate(entries)
    )


def _layer_of(module: nn.Module, *, name: str) -> Layer:
    """Cost: a module without a declared one is taken to cost what its parameters suggest."""
    cost = float(sum(parameter.numel() for parameter in module.parameters())) or 1.0
    return Layer(f"{name} ({type(module).__name__})", (Phase("forward", module),), (module,), cost)


def run_uncut(model: PipelineModel, batch: Batch) -> dict[str, Tensor] | Tensor:
    """The whole model on this device: what every pipeline must reproduce.

    With ``"labels"`` in the batch the means over its tokens, ``"loss"`` among them, and ``"tokens"``,
    their number; without, the first value of the last layer, for instance logits.
    """
    values = model.inputs(batch)
    values = values if isinstance(values, tuple) else (values,)
    with_loss = "labels" in batch
    for layer in as_layers(model.layers()):
        if with_loss or not layer.for_loss:
            values = layer(values, batch)
    return only_the_loss_carries_gradients(means(model.loss(values, batch))) if with_loss else values[0]


def means(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over tokens divided by their number, which stays; 0 / 0 is 0, so that an empty batch has loss 0."""
    count = sums["tokens"].clamp(min=1)
    return {name: value if name == "tokens" else value / count for name, value in sums.items()}


def only_the_loss_carries_gradients(report: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means of which every other one refuses a backward, so that a term added to the loss is not lost in silence.

    A pipeline has computed the gradients of ``"loss"`` by the time it returns, and no others.
    """
    if not report["loss"].requires_grad:
        return report
    return {name: mean if name in ("loss", "tokens") else _refusing(name, mean) for name, mean in report.items()}


def _refusing(name: str, mean: Tensor) -> Tensor:
    if not mean.is_floating_point():
        return mean
    leaf = mean.detach().requires_grad_()
    leaf.register_hook(partial(_refuse, name))
    return leaf.clone()  # which, unlike a leaf, may be changed in place


def _refuse(name: str, _: Tensor) -> None:
    raise ConfigurationError(
        f"a backward reaches {name!r}, which the model reports, but only 'loss' carries gradients; add the term to "
        f"'loss' in the model's loss(), with its weight, and report {name!r} beside it"
    )
