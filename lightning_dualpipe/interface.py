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
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning_dualpipe.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "TOKENIZER_FILES",
    "Batch",
    "Flight",
    "ForgetsSteps",
    "InitializesWeights",
    "KeepsHighPrecision",
    "KnowsPlaces",
    "Layer",
    "Phase",
    "PipelineModel",
    "ReplicaAware",
    "TensorSpec",
    "Values",
    "WeightGradients",
    "as_layers",
    "is_recomputing",
    "means",
    "only_the_loss_carries_gradients",
    "recomputing",
    "run_uncut",
]

Batch = Mapping[str, "Tensor"]
"""Tensors by name; samples are dimension 0 of each."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What ``tokenizer.files`` of a data module may hold, text by name. A model's checkpoints carry them to its export."""
Values = tuple[Any, ...]
"""What one phase hands to the next: tensors, and between the phases of one layer also opaque handles."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape of a tensor that crosses a cut.

    ``dtype=None`` means the dtype of the model's parameters.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


class Flight(Protocol):
    """Values on their way to other ranks. Launched, it needs nobody until somebody wants what arrives."""

    def land(self) -> Values:
        """Wait, and return what has arrived. Once."""
        ...

    def back(self, gradients: Values) -> Flight:
        """Launch the way back: of each of the values that arrived, the gradient, or None where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Phase:
    """A piece of a layer that is all compute or all communication.

    A phase that communicates has a ``launch`` too, by which a pipeline can compute something else while
    the values travel; ``run`` is the same with the waiting, and its backward.

    With ``recompute`` it is to keep its inputs only and to run again, in ``recomputing()``, before its
    backward. That changes memory and time, not numbers, so whoever keeps nothing may leave it out.
    Never set for communication: ranks would have to agree on the order of that, too.
    """

    name: str
    run: Callable[..., Any]  # (*values) -> a tensor or a tuple
    launch: Callable[..., Flight] | None = None  # (*values) -> the same tuple, on its way
    takes_batch: bool = False  # run(*values, batch=batch)
    skips: int = 0  # so many leading values pass it by
    takes: int | None = None  # and it is given so many of the others, or all; the rest pass it by too
    has_peers: Callable[[], bool] | None = None  # whether ``launch`` has anybody to talk to; None: yes
    recompute: bool = False

    def __call__(self, values: Values, batch: Batch) -> Values:
        return self.replaced(values, self.work(self.own(values), batch))

    def work(self, own: Values, batch: Batch) -> Values:
        """Run on nothing but its own values."""
        out = self.run(*own, batch=batch) if self.takes_batch else self.run(*own)
        return out if isinstance(out, tuple) else (out,)

    @property
    def communicates(self) -> bool:
        return self.launch is not None and (self.has_peers is None or self.has_peers())

    def own(self, values: Values) -> Values:
        """Of the values of the phase before, those that this one works on."""
        return values[self.skips : self._end(values)]

    def replaced(self, values: Values, own: Values) -> Values:
        """``values`` with its own replaced."""
        return *values[: self.skips], *own, *values[self._end(values) :]

    def is_passed_by(self, other: Phase) -> bool:
        """Whether ``other`` works on values behind this one's alone: it can run while these travel."""
        return not other.communicates and self.takes is not None and other.skips >= self.skips + self.takes

    def after(self, count: int) -> Phase:
        """The same phase where ``count`` more values lead."""
        return replace(self, skips=self.skips + count)

    def _end(self, values: Values) -> int:
        return len(values) if self.takes is None else self.skips + self.takes


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
class KeepsHighPrecision(Protocol):
    """A module with submodules whose products are too sensitive for FP8, an output head for instance."""

    in_high_precision: Sequence[str]
    """Their names in this module; what is beneath them is meant too."""


@runtime_checkable
class ReplicaAware(Protocol):
    """A strategy under which ranks hold different parts of a model, and losses are those of the global batch."""

    def sum_over_replicas(self, tensors: Mapping[str, Tensor]) -> None:
        """Sum each tensor, in place, over the ranks that hold the tensor of the LightningModule it is named after."""
        ...

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients of the whole model; the same on every rank."""
        ...

    def local_tensors(self, whole: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of a whole state dict of the LightningModule, what this rank holds."""
        ...

    def whole_tensors(self) -> Iterator[tuple[str, range | None, Tensor]]:
        """On rank 0 every tensor of the whole LightningModule, by name; spread ones in pieces with their rows.

        A collective: every rank iterates to the end.
        """
        ...


@runtime_checkable
class KnowsPlaces(Protocol):
    """A strategy that can say where in a pipeline something has gone wrong. None of it is a collective."""

    def stages_of(self, parameter: str) -> Sequence[int]:
        """The stages that use the parameter of this name in the LightningModule."""
        ...

    def microbatch_losses(self) -> Mapping[int, Tensor]:
        """By microbatch of the last training batch the sum of its losses, where this rank has computed it."""
        ...


@runtime_checkable
class ForgetsSteps(Protocol):
    """A LightningModule that counts what it trains on."""

    def on_step_skipped(self) -> None:
        """Take back what was counted since the last optimizer step: its gradients are not used."""
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

    def take(self) -> list[Callable[[], None]]:
        """All that wait, in order; from now on it is the caller who computes them."""
        taken = list(self._waiting)
        self._waiting.clear()
        return taken


def as_layers(entries: Iterable[Layer | nn.Module]) -> tuple[Layer, ...]:
    """Entries of ``PipelineModel.layers()``, a plain module being a layer of one phase."""
    return tuple(
        entry if isinstance(entry, Layer) else _layer_of(entry, name=str(index)) for index, entry in enumerate(entries)
    )


def _layer_of(module: nn.Module, *, name: str) -> Layer:
    """Cost: a module without a declared one is taken to cost what its parameters suggest."""
    cost = float(sum(parameter.numel() for parameter in module.parameters())) or 1.0
    return Layer(f"{name} ({type(module).__name__})", (Phase("forward", module),), (module,), cost)


_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


class recomputing:
    """``with recomputing():`` what runs a second time for the sake of a backward. May be entered again later."""

    def __enter__(self) -> None:
        self._token = _RECOMPUTING.set(True)

    def __exit__(self, *error: object) -> None:
        _RECOMPUTING.reset(self._token)


def is_recomputing() -> bool:
    """For whatever leaves traces in a forward, a count of tokens for instance: not the second time."""
    return _RECOMPUTING.get()


def run_uncut(
    model: PipelineModel, batch: Batch, run: Callable[[Phase, Values, Batch], Values] = Phase.__call__
) -> dict[str, Tensor] | Tensor:
    """The whole model on this device: what every pipeline must reproduce.

    With ``"labels"`` in the batch the means over its tokens, ``"loss"`` among them, and ``"tokens"``,
    their number; without, the first value of the last layer, for instance logits.

    Args:
        run: runs one phase. The default keeps all that autograd wants, whatever ``Phase.recompute`` says.
    """
    values = model.inputs(batch)
    values = values if isinstance(values, tuple) else (values,)
    with_loss = "labels" in batch
    for layer in as_layers(model.layers()):
        if with_loss or not layer.for_loss:
            for phase in layer.phases:
                values = run(phase, values, batch)
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
