"""The most memory that any rank has held so far, in the log; ``RunReport`` says at the end which rank it was."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_dualpipe.callbacks.report_steps import report_is_due
from lightning_dualpipe.metrics.memory import peak_memory

__all__ = ["GIB", "PeakMemory", "peak_of_ranks"]

GIB = 2**30


class PeakMemory(Callback):
    """Logs ``peak_memory_gib``, the largest of all ranks, every ``log_every_n_steps`` optimizer steps.

    On GPUs what torch had allocated, else the resident memory of the process; since the process began.
    """

    def __init__(self) -> None:
        self._reported_at = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reported_at = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if report_is_due(trainer, last=self._reported_at):
            self._reported_at = trainer.global_step
            pl_module.log("peak_memory_gib", max(peak_of_ranks(trainer)) / GIB)


def peak_of_ranks(trainer: Trainer) -> list[int]:
    """Bytes, by rank. A collective."""
    mine = peak_memory(trainer.strategy.root_device)
    if not dist.is_initialized():
        return [mine]
    found = [0] * dist.get_world_size()
    # of all ranks: a strategy's own gathering is over its data ranks, whose stages are the same
    dist.all_gather_object(found, mine)
    return found
