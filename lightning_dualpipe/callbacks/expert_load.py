"""How even the load of the experts is, layer by layer, wherever the layers are.

A pipeline rank knows the layers it holds; the logger of rank 0 is to show all. So the ranks agree
once on the names of all layers, and then take the maximum over a vector with one place for each.
Every rank logs the same keys and values.
"""

import re
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_dualpipe.callbacks.report_steps import report_is_due
from lightning_dualpipe.metrics.experts import dead_experts, max_violation

__all__ = ["CountsExpertLoad", "ExpertLoad"]


@runtime_checkable
class CountsExpertLoad(Protocol):
    """A LightningModule with mixtures of experts, such as ``DeepSeekV3``."""

    expert_load: dict[str, Tensor]
    """Tokens per expert [E] of the last optimizer step, over all ranks, by router; of the layers held here."""


class ExpertLoad(Callback):
    """Logs MaxVio of the optimizer steps since the last report, every ``log_every_n_steps``.

    max_violation/blocks.3     (largest load - mean load) / mean load of that layer
    max_violation              that of the worst layer
    dead_experts               experts of all layers that no token chose
    """

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        self._names: list[str] | None = None  # of all layers, on whichever rank
        self._counted_at = self._reported_at = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts, self._names = {}, None
        self._counted_at = self._reported_at = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not isinstance(pl_module, CountsExpertLoad) or step == self._counted_at:  # gradients are still gathered
            return
        self._counted_at = step
        for name, counts_E in pl_module.expert_load.items():
            self._counts[name] = self._counts[name] + counts_E if name in self._counts else counts_E.clone()
        if report_is_due(trainer, last=self._reported_at):
            self._reported_at = step
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._names is None:
            self._names = _all_names(list(self._counts))
        if not self._names:
            return
        measured = _gathered(self._names, self._counts, trainer, pl_module.device)
        violations, dead = measured.tolist()
        self._counts = {}
        pl_module.log_dict(
            {f"max_violation/{_short(name)}": v for name, v in zip(self._names, violations, strict=True)}
        )
        pl_module.log_dict({"max_violation": max(violations), "dead_experts": float(sum(dead))})


def _all_names(mine: list[str]) -> list[str]:
    """Of the layers of all ranks, in one order on every rank: ``blocks.2`` before ``blocks.10`` before ``mtp.0``."""
    found = [mine]
    if dist.is_available() and dist.is_initialized():
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
    return sorted({name for names in found for name in names}, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers compare as numbers."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def _gathered(names: list[str], counts: dict[str, Tensor], trainer: Trainer, device: torch.device) -> Tensor:
    """MaxVio and dead experts of every layer [2, layers], the same on every rank."""
    measured = torch.full((2, len(names)), -1.0, dtype=torch.float64, device=device)
    for index, name in enumerate(names):
        if name in counts:
            measured[0, index] = max_violation(counts[name])
            measured[1, index] = dead_experts(counts[name])
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return cast(Tensor, trainer.strategy.reduce(measured, group=world, reduce_op="max"))


def _short(router: str) -> str:
    """``blocks.3.mlp.gate`` -> ``blocks.3``, ``mtp.0.block.mlp.gate`` -> ``mtp.0``."""
    return router.removesuffix(".gate").removesuffix(".mlp").removesuffix(".block")
