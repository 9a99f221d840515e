"""SLURM's notice that the time of a job is nearly over, between batches instead of anywhere.

Lightning's handler of that signal (SIGUSR1) saves a checkpoint, wherever its rank happens to be. Here saving
is a collective, and another rank may be in the middle of a batch, waiting for this one. So the signal only
leaves a note; after each batch all ranks look whether any of them has one, and then the handler runs on all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

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


class _Requeue(Callback):
    """Acts once: ranks do not get the signal at the same moment, and the last may get it when all have acted.

    Not during prediction, where pipelines may have different numbers of batches.
    """

    def __init__(self, save_and_requeue: Callable[..., None], group: dist.ProcessGroup) -> None:
        self._save_and_requeue = save_and_requeue
        self._group = group
        self._noted = 0
        self._done = False

    def note(self, number: int, _: FrameType | None) -> None:
        self._noted = number

    def _look(self, trainer: Trainer) -> None:
        if self._done or trainer.sanity_checking:
            return
        noted = torch.tensor(self._noted)
        dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        if noted:
            self._done = True
            with _written_at_once(trainer.strategy):
                self._save_and_requeue(int(noted), None)

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._look(trainer)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._look(trainer)

    @override
    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._look(trainer)


@contextmanager
def _written_at_once(strategy: Any) -> Iterator[None]:
    """SLURM ends the job as soon as it is requeued: what was still being written then would be lost."""
    how = getattr(strategy, "save_distributed_checkpoint", False)
    strategy.save_distributed_checkpoint = bool(how)
    try:
        yield
    finally:
        strategy.save_distributed_checkpoint = how
