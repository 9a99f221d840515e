"""What ranks tell each other outside the pipeline: metrics, decisions, barriers.

Within a pipeline all ranks have the same losses and metrics, so reductions and gathers go over the data ranks.
After an interrupt other ranks may never come: every collective becomes a no-op, and nothing hangs.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from typing_extensions import override

from lightning_dualpipe.parallel.groups import Groups

__all__ = ["PipelineCollectives"]

_REDUCTIONS = {
    "mean": dist.ReduceOp.SUM,  # and then divided: gloo has no mean
    "avg": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


class PipelineCollectives(ParallelStrategy, ABC):
    """The collectives of a strategy whose ranks form pipelines."""

    @property
    @abstractmethod
    def groups(self) -> Groups:
        """Whom this rank talks to."""

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None, "the Trainer connects a module before it calls its strategy"
        return self.lightning_module

    @property
    def _alone(self) -> bool:
        if not _distributed_is_initialized() or self.world_size == 1:
            return True
        trainer = self.lightning_module._trainer if self.lightning_module is not None else None
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    @override
    def barrier(self, name: str | None = None) -> None:
        if self._alone:
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._alone:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: dist.ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Over the data ranks unless a group is given: within a pipeline all ranks have the same value."""
        group = self.groups.data if group is None else group
        if not isinstance(tensor, Tensor) or self._alone or group is None:
            return tensor
        name = "mean" if reduce_op is None else reduce_op.lower() if isinstance(reduce_op, str) else None
        mean = name in ("mean", "avg")
        reduced = tensor.clone()
        dist.all_reduce(reduced, op=reduce_op if name is None else _REDUCTIONS[name], group=group)
        return reduced / dist.get_world_size(group) if mean else reduced

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._alone:
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Over the data ranks unless a group is given. One data rank has all there is, as one process has."""
        if group is None or group is dist.group.WORLD:  # Lightning passes WORLD where the user passes nothing
            group = self.groups.data
        return tensor if self._alone or group is None else super().all_gather(tensor, group, sync_grads)
