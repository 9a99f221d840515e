"""Bytes on one rank, by what they are for.

    weights        2 a parameter: BF16; FP8 is cast from it when used
    gradients      4: they are summed in FP32 over the microbatches (or 2)
    optimizer      12 / replicas: FP32 master weight and two moments, sharded over all that have the parameter (ZeRO-1)
    activations    Σ over the rank's stages:  microbatches held x tokens x kept bytes
    logits         6 a logit of one microbatch: BF16, and FP32 in the loss
    working        what one layer has beside, while its backward runs: recomputed values and gradients
    buffers        of messages between stages, and of all-to-alls, two of each where pairs overlap
    reserved       CUDA context, NCCL's channels, fragments: an assumption

The rank that needs most counts. With ``dualpipe`` a stage is on two ranks, so weights and gradients
count twice in a pipeline, optimizer states once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lightning_dualpipe.planner.layout import Layout
from lightning_dualpipe.planner.model import LayerShape, ModelShape
from lightning_dualpipe.planner.step import held_microbatches

__all__ = ["Memory", "Near", "Storage", "largest_memory", "near"]

_WEIGHT, _LOGIT, _RESERVED = 2, 6, 2e9


@dataclass(frozen=True, slots=True)
class Near:
    """Parameters that a rank holds: those every data rank has, and its share of the routed experts."""

    dense: int
    experts: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    buffers: float
    reserved: float = _RESERVED

    @property
    def total(self) -> float:
        kept = self.weights + self.gradients + self.optimizer + self.activations
        return kept + self.logits + self.working + self.buffers + self.reserved

    def largest(self) -> str:
        """The three largest parts, in words."""
        parts = sorted(asdict(self).items(), key=lambda part: -part[1])[:3]
        return ", ".join(f"{name} {amount / 1e9:.1f}" for name, amount in parts)


@dataclass(frozen=True, slots=True)
class Storage:
    """What is kept how."""

    fp8: bool = False
    recompute: bool = True
    gradient_bytes: int = 4
    optimizer_bytes: int = 12


def near(layout: Layout, stages: Sequence[Sequence[LayerShape]], rank: int) -> Near:
    """What a layer borrows from the first one is a copy, unless the rank has the first one."""
    here = layout.placement.stages_on(rank)
    layers = [layer for stage in here for layer in stages[stage]]
    borrowed = 0 if 0 in here else max(layer.borrowed for layer in layers)
    return Near(
        dense=sum(layer.dense for layer in layers) + borrowed,
        experts=sum(layer.experts for layer in layers) // layout.expert,
    )


def largest_memory(
    layout: Layout, model: ModelShape, stages: Sequence[Sequence[LayerShape]], storage: Storage
) -> Memory:
    """Of the rank that needs most."""
    held = held_microbatches(layout.schedule, layout.num_microbatches, layout.num_stages)
    kept = [sum(layer.kept.bytes(fp8=storage.fp8, recompute=storage.recompute) for layer in stage) for stage in stages]
    # In a DualPipe the ranks of the other half hold the same.
    ranks = range((layout.pipeline + 1) // 2 if layout.schedule == "dualpipe" else layout.pipeline)
    memories = (_of_rank(layout, model, stages, storage, rank, held, kept) for rank in ranks)
    return max(memories, key=lambda memory: memory.total)


def _of_rank(
    layout: Layout,
    model: ModelShape,
    stages: Sequence[Sequence[LayerShape]],
    storage: Storage,
    rank: int,
    held: Sequence[int],
    kept: Sequence[float],
) -> Memory:
    here = layout.placement.stages_on(rank)
    parameters = near(layout, stages, rank)
    layers = [layer for stage in here for layer in stages[stage]]
    tokens = layout.sequences * model.sequence_length
    return Memory(
        weights=_WEIGHT * (parameters.dense + parameters.experts),
        gradients=storage.gradient_bytes * (parameters.dense + parameters.experts),
        optimizer=storage.optimizer_bytes
        * (parameters.dense / layout.replicas + parameters.experts / layout.expert_replicas),
        activations=tokens * sum(held[stage] * kept[stage] for stage in here),
        logits=_LOGIT * tokens * max(layer.logits for layer in layers),
        working=tokens * max(layer.kept.bytes(fp8=storage.fp8, recompute=False) for layer in layers),
        buffers=tokens * _buffered(layout, model, storage),
    )


def _buffered(layout: Layout, model: ModelShape, storage: Storage) -> float:
    """Bytes a token."""
    at_once = 2 if layout.schedule in ("dualpipe", "dualpipev") else 1
    messages = 4 * at_once * 2 * model.hidden if layout.pipeline > 1 else 0  # in and out, there and back, BF16
    if layout.expert == 1:
        return messages
    rows = model.experts_per_token * model.hidden * ((1 if storage.fp8 else 2) + 2)  # dispatched, and to be combined
    return messages + at_once * rows
