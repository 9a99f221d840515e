"""Where NaN and infinity are: looked for only when it is known that there are some.

A NaN goes through a backward from where it arises to the first layer. So of all gradients that are not finite
the one to look at is the last in the order of the model: the first in the order of the backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_dualpipe.interface import KnowsPlaces

__all__ = ["NonFinite", "find_nonfinite"]

Place = tuple[int, int, str]
"""Stage, place among the parameters of its rank, name: in the order of the model."""


@dataclass(frozen=True)
class _OfRank:
    losses: list[tuple[int, float]]  # of batches
    microbatches: list[tuple[int, float]]  # of the last batch
    gradients: list[Place]
    weights: list[Place]


@dataclass(frozen=True)
class NonFinite:
    """What is not finite, on all ranks."""

    losses: str
    gradients: str
    weights: str

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.losses, self.gradients, self.weights)))


def find_nonfinite(trainer: Trainer, module: LightningModule, losses: Sequence[tuple[int, Tensor]]) -> NonFinite:
    """A collective. ``losses`` of the batches of this optimizer step, with their numbers."""
    strategy = trainer.strategy
    pipeline = strategy if isinstance(strategy, KnowsPlaces) else None
    mine = _OfRank(
        losses=_nonfinite(losses),
        microbatches=_nonfinite(sorted(pipeline.microbatch_losses().items()) if pipeline is not None else []),
        gradients=_places(module, pipeline, of_gradients=True),
        weights=_places(module, pipeline, of_gradients=False),
    )
    ranks = [mine]
    if dist.is_available() and dist.is_initialized():
        ranks = [mine] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    pipelined = pipeline is not None
    return NonFinite(
        _of_losses(ranks, pipelined=pipelined), _of_gradients(ranks, pipelined=pipelined), _of_weights(ranks)
    )


def _places(module: LightningModule, pipeline: KnowsPlaces | None, *, of_gradients: bool) -> list[Place]:
    return [
        (max(pipeline.stages_of(name)) if pipeline is not None else 0, index, name)
        for index, (name, parameter) in enumerate(module.named_parameters())
        if _is_nonfinite(parameter.grad if of_gradients else parameter.detach())
    ]


def _of_losses(ranks: Sequence[_OfRank], *, pipelined: bool) -> str:
    if pipelined:  # the loss of a batch is the same on all ranks
        found = [f"batch {batch} {value}" for batch, value in ranks[0].losses]
    else:
        found = [
            f"batch {batch}{f' on rank {rank}' if len(ranks) > 1 else ''} {value}"
            for rank, of_rank in enumerate(ranks)
            for batch, value in of_rank.losses
        ]
    pieces = [
        f"microbatch {index} on rank {rank} {value}"
        for rank, of_rank in enumerate(ranks)
        for index, value in of_rank.microbatches
    ]
    if not found:
        return ""
    return f"the loss is not finite: {_some(found)}{f' ({_some(pieces)})' if pieces else ''}"


def _of_gradients(ranks: Sequence[_OfRank], *, pipelined: bool) -> str:
    places = {place[2]: place for of_rank in ranks for place in of_rank.gradients}
    if not places:
        return ""
    stage, _, name = max(places.values())
    where = [f"stage {stage}"] if pipelined else []
    if len(ranks) > 1:
        held = [str(rank) for rank, of_rank in enumerate(ranks) if any(found[2] == name for found in of_rank.gradients)]
        where.append(f"rank{'s' * (len(held) > 1)} {', '.join(held)}")
    place = f" ({', '.join(where)})" if where else ""
    others = f", and {len(places) - 1} after it" if len(places) > 1 else ""
    return f"the gradient of {name}{place} is not finite{others}"


def _of_weights(ranks: Sequence[_OfRank]) -> str:
    names = [place[2] for place in sorted({place for of in ranks for place in of.weights}, key=lambda place: place[:2])]
    if not names:
        return ""
    return f"these weights are not finite themselves, which no skipped step mends: {_some(list(dict.fromkeys(names)))}"


def _some(found: Sequence[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


_SHOWN = 4


def _nonfinite(losses: Sequence[tuple[int, Tensor]]) -> list[tuple[int, float]]:
    """Those that are not finite."""
    return [(index, float(loss)) for index, loss in losses if not torch.isfinite(loss).all()]


def _is_nonfinite(tensor: Tensor | None) -> bool:
    """By its norm, as it was found: elements whose squares overflow count too."""
    if tensor is None or not tensor.is_floating_point():
        return False
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return not torch.isfinite(torch.linalg.vector_norm(tensor, dtype=dtype))
