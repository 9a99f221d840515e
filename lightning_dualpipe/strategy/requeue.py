"""SLURM's notice that the time of a job is nearly over, between batches instead of anywhere.

Lightning's handler of that signal (SIGUSR1) saves a checkpoint, wherever its rank happens to be. Here saving
is a collective, so it waits for the end of a batch (``between_batches``), and then runs on all ranks.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from lightning_dualpipe.between_batches import BetweenBatches, written_at_once

__all__ = ["requeue_between_batches"]


def requeue_between_batches(trainer: Trainer, group: dist.ProcessGroup | None) -> None:
    """Where Lightning requeues jobs, and there is more than one rank. ``group``: all of them, on the host."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    environment, connector = trainer.strategy.cluster_environment, trainer._signal_connector  # type: ignore[attr-defined]
    requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    if group is None or not requeues or any(isinstance(callback, _Requeue) for callback in callbacks):
        return
    requeue = _Requeue(connector._slurm_sigusr_handler_fn, group)
    connector._slurm_sigusr_handler_fn = requeue.note  # type: ignore[method-assign,assignment]
    callbacks.append(requeue)  # the last, so that the others have seen the batch when a checkpoint is written


class _Requeue(BetweenBatches):
    def __init__(self, save_and_requeue: Callable[..., None], group: dist.ProcessGroup) -> None:
        super().__init__()
        self._save_and_requeue = save_and_requeue
        self._group = group

    @override
    def _agree(self, trainer: Trainer, noted: int) -> int:
        agreed = torch.tensor(noted)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
        return int(agreed)

    @override
    def _act(self, trainer: Trainer, number: int) -> None:
        with written_at_once(trainer.strategy):
            self._save_and_requeue(number, None)
