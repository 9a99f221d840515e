"""The user's optimizers: each rank steps on its share of what they update; see ``parallel.sharded_optimizer``."""

from collections.abc import Sequence

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_dualpipe.parallel.sharded_optimizer import ShardedOptimizer
from lightning_dualpipe.strategy.assembly import Assembly
from lightning_dualpipe.strategy.collectives import PipelineCollectives

__all__ = ["PipelineOptimizers"]


class PipelineOptimizers(PipelineCollectives):
    """Whoever sets ``optimizers`` (Lightning after ``configure_optimizers``, or a callback), they are shared out."""

    assembly: Assembly | None = None
    """This rank's part of the model, once the Trainer has set it up."""
    _sharded: Sequence[ShardedOptimizer] = ()

    @property
    def optimizers(self) -> list[Optimizer]:
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        self._lightning_optimizers = [LightningOptimizer._to_lightning_optimizer(each, self) for each in optimizers]
        if self.assembly is not None:
            self._sharded = [self._shared_out(optimizer, self.assembly) for optimizer in optimizers]

    def _shared_out(self, optimizer: Optimizer, assembly: Assembly) -> ShardedOptimizer:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        for sharded in self._sharded:
            if sharded.optimizer is optimizer:  # states belong to its shards; released by the end of another fit
                sharded.take_over()
                return sharded
        return ShardedOptimizer(optimizer, assembly.named_parameters, assembly.replicas)

    def _sharded_of(self, optimizer: Optimizer) -> ShardedOptimizer:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return next(sharded for sharded in self._sharded if sharded.optimizer is optimizer)

    def _release_optimizers(self) -> None:
        for sharded in self._sharded:
            sharded.release()
