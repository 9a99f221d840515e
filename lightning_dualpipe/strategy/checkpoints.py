"""Checkpoints of ranks that hold parts of a model: one file, as ``strategy="auto"`` would have written it, or a
directory into which every rank writes what it has. Both are loaded under any layout.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dualpipe.checkpoint.directory import is_directory, remove
from lightning_dualpipe.checkpoint.single_file import loaded
from lightning_dualpipe.checkpoint.stored import open_stored
from lightning_dualpipe.checkpoint.writing import writing
from lightning_dualpipe.pipeline.partition import is_extra_state
from lightning_dualpipe.strategy.distributed_saves import RANDOM_STATES, DistributedSaves
from lightning_dualpipe.strategy.optimizers import PipelineOptimizers
from lightning_dualpipe.strategy.random_states import set_random_states

__all__ = ["PipelineCheckpoints"]

_MAIN_WEIGHTS = "main_weights"
"""Where a checkpoint has the float32 weights behind parameters in half precision. Others do not look there."""

_OPTIMIZED = "optimized_parameters"
"""Where a checkpoint has the names behind the indices of ``optimizer_states``: by optimizer and group. As torch's
``param_names`` in the groups they would stay there under ``auto``, where ``add_param_group`` then wants names too."""

_CURRENT = "current_model_state"
"""Where Lightning's weight averaging keeps the weights that are trained; ``state_dict`` is their average then."""


class PipelineCheckpoints(PipelineOptimizers):
    """Collects what the ranks hold, and hands each its part; the folder ``checkpoint`` does the work."""

    save_distributed_checkpoint: bool | Literal["async"] = False
    _saves: DistributedSaves | None = None
    _random_states: str | None = None
    """Until the first batch of a run that goes on."""

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.assembly is not None
        return self.assembly.store.local_optimizer_state(self._sharded_of(optimizer))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """A directory, or one file of rank 0, complete and in the form that ``strategy="auto"`` writes."""
        if self._alone and self.world_size > 1:
            rank_zero_warn(
                f"{filepath} is not written: the run was interrupted and other ranks may be gone, so their part of "
                "the model cannot be collected. The last regular checkpoint is intact."
            )
            return
        assert self.assembly is not None
        extra = self._extra_states(checkpoint["state_dict"])
        if self.save_distributed_checkpoint:
            # outside of fit nobody would wait for the thread
            fitting = self._module.trainer.state.status == TrainerStatus.RUNNING
            background = fitting and self.save_distributed_checkpoint == "async"
            self._distributed.save(checkpoint, filepath, self._sharded, extra=extra, background=background)
            return
        for key in ("state_dict", _CURRENT):
            if key in checkpoint:
                checkpoint[key] = self.assembly.store.whole_state_dict(checkpoint[key])
        checkpoint["state_dict"] |= extra
        if "optimizer_states" in checkpoint:
            states = checkpoint["optimizer_states"]
            collected = [self.assembly.store.whole_optimizer_state(state) for state in states]
            checkpoint["optimizer_states"] = [state for state, _ in collected]
            checkpoint[_OPTIMIZED] = [names for _, names in collected]
            if main_weights := self.assembly.store.whole_main_weights(self._sharded):
                checkpoint[_MAIN_WEIGHTS] = main_weights
        with writing():
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @property
    def _distributed(self) -> DistributedSaves:
        assert self.assembly is not None
        if self._saves is None or self._saves.store is not self.assembly.store:
            self._saves = DistributedSaves(
                self.assembly.store,
                rank=self.global_rank,
                timeout=self.groups.timeout,
                written_by=f"{self.world_size} ranks, {self.assembly.part.made_for}",
            )
        return self._saves

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        if self.is_global_zero and (self._saves is not None and self._saves.busy):
            self._saves.remove_later(filepath)
        elif self.is_global_zero and is_directory(filepath):
            remove(Path(filepath))
        else:
            super().remove_checkpoint(filepath)

    @override
    def _settle_saving(self) -> None:
        if self._saves is not None:
            self._saves.settle()

    def _finish_saving(self) -> None:
        """Before the ranks part, or somebody wants to read what was saved."""
        if self._saves is not None:
            self._saves.finish(interrupted=self._alone and self.world_size > 1)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a directory only what is no tensor is read here; of tensors each rank reads its part when it needs it."""
        self._finish_saving()
        if not is_directory(checkpoint_path):
            return loaded(partial(super().load_checkpoint, checkpoint_path, weights_only), checkpoint_path)
        checkpoint = open_stored(checkpoint_path).checkpoint()
        random_states = checkpoint.get(RANDOM_STATES, {})
        if random_states.get("written_by") == self._distributed.written_by:
            self._random_states = random_states["ranks"][self.global_rank]
        return checkpoint

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self._random_states is not None and self._module.trainer.training:
            set_random_states(self._random_states)
            self._random_states = None
        return super().batch_to_device(batch, device, dataloader_idx)

    def whole_tensors(self) -> Iterator[tuple[str, range | None, Tensor]]:
        """On rank 0 every tensor of the whole LightningModule, by name; spread ones in pieces with their rows.

        A collective: every rank iterates to the end.
        """
        assert self.assembly is not None
        return self.assembly.store.stream(self._module.state_dict())

    def local_tensors(self, whole: Mapping[str, Tensor], *, strict: bool = True) -> dict[str, Tensor]:
        """Of a whole state dict of the LightningModule, what this rank holds."""
        assert self.assembly is not None
        return self.assembly.store.local_state_dict(whole, self._module.state_dict(), strict=strict)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        names = self._module.state_dict()
        saved: Mapping[str, Any] = checkpoint["state_dict"]
        extra = {name: value for name, value in saved.items() if is_extra_state(name) and name in names}
        tensors = {name: value for name, value in saved.items() if not is_extra_state(name)}
        self._module.load_state_dict(self.local_tensors(tensors, strict=strict) | extra, strict=strict)

    def _extra_states(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """On rank 0 what modules of any rank say of themselves (``get_extra_state``). A collective."""
        mine = {name: value for name, value in state.items() if is_extra_state(name)}
        mine = apply_to_collection(mine, Tensor, lambda tensor: tensor.detach().cpu())
        if self.groups.world_host is None:
            return mine
        found: list[dict[str, Any]] = [{}] * self.world_size
        dist.gather_object(mine, found if self.global_rank == 0 else None, group=self.groups.world_host)
        # where several ranks hold a module, the lowest speaks for it, as it does for its tensors
        return {name: value for part in reversed(found) for name, value in part.items()}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.assembly is not None
        self._settle_saving()
        states = checkpoint["optimizer_states"]
        if not states:  # weights to begin with, such as an imported model's
            return
        optimized = checkpoint.get(_OPTIMIZED, [None] * len(states))
        for sharded, state, names in zip(self._sharded, states, optimized, strict=True):
            self.assembly.store.load_optimizer_state(sharded, state, names)
        self.assembly.store.load_main_weights(self._sharded, checkpoint.get(_MAIN_WEIGHTS, {}))
        _optimizers_to_device(self.optimizers, self.root_device)
