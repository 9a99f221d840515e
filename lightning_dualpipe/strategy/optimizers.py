"""The user's optimizers: each rank steps on its share of what they update; see ``parallel.sharded_optimizer``.

``configure_optimizers`` sees the whole model, without the memory of what other ranks hold. So it may name any part of
it, and we learn the order of all parameters: the one by which torch numbers the states in a checkpoint.
"""

from collections.abc import Sequence
from hashlib import sha256

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer, _init_optimizers_and_lr_schedulers
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.sharded_optimizer import ShardedOptimizer, WholeOrder
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

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        assert self.assembly is not None and self.lightning_module is not None
        with self.assembly.uncut() as stand_ins:
            optimizers, self.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(self.lightning_module)
        named = {id(parameter): name for name, parameter in self.assembly.named_parameters().items()}
        orders = [WholeOrder.of(optimizer, named, stand_ins) for optimizer in optimizers]
        self._check_orders(orders)
        known = {id(sharded.optimizer) for sharded in self._sharded}
        self.optimizers = optimizers
        for sharded, order in zip(self._sharded, orders, strict=True):
            if id(sharded.optimizer) not in known:  # one that is kept from an earlier fit has lost the others' by now
                sharded.order = order

    def _check_orders(self, orders: Sequence[WholeOrder]) -> None:
        assert self.assembly is not None
        group = self.assembly.store.group
        if group is None:
            return
        mine = sha256(repr(orders).encode()).hexdigest()
        found: list[str] = [""] * dist.get_world_size(group)
        dist.all_gather_object(found, mine, group=group)
        if others := [rank for rank, theirs in enumerate(found) if theirs != found[0]]:
            raise ConfigurationError(
                "configure_optimizers gives the parameters of the whole model to its optimizers in another order, or "
                f"in other groups, on ranks {others} than on rank 0, so that no checkpoint could number their states; "
                "let groups depend on names and shapes only, and keep parameters in lists, not in sets"
            )

    def _shared_out(self, optimizer: Optimizer, assembly: Assembly) -> ShardedOptimizer:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        for sharded in self._sharded:
            if sharded.optimizer is optimizer:  # states belong to its shards; released by the end of another fit
                sharded.take_over()
                return sharded
        return ShardedOptimizer(optimizer, assembly.named_parameters, assembly.replicas, self._settle_saving)

    def _settle_saving(self) -> None:
        """Optimizer states may be changed from here on."""

    def _sharded_of(self, optimizer: Optimizer) -> ShardedOptimizer:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return next(sharded for sharded in self._sharded if sharded.optimizer is optimizer)

    def _release_optimizers(self) -> None:
        for sharded in self._sharded:
            sharded.release()
