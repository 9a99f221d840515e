"""Checkpoint directories, saved at once or in the background.

    at once          all ranks write what they have, and go on when rank 0 has put the directory in place
    in background    this rank's share is copied to host memory, weights at once, what only optimizers change before
                     their next step; a thread writes it while training goes on, and talks to the threads of other
                     ranks over a group of its own. Whoever saves, loads or ends next waits

A checkpoint that ModelCheckpoint no longer wants goes when the one after it is in place, by the same thread.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH

from lightning_dualpipe.checkpoint.background import Background
from lightning_dualpipe.checkpoint.directory import remove
from lightning_dualpipe.checkpoint.pieces import main_weight_pieces, optimizer_pieces, weight_pieces
from lightning_dualpipe.checkpoint.snapshot import Snapshots
from lightning_dualpipe.checkpoint.store import CheckpointStore
from lightning_dualpipe.checkpoint.writer import Contents, Piece, save
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.groups import create_groups
from lightning_dualpipe.parallel.sharded_optimizer import ShardedOptimizer
from lightning_dualpipe.strategy.random_states import collect_random_states

__all__ = ["RANDOM_STATES", "DistributedSaves"]

RANDOM_STATES = "random_states"

_PARTING_SECONDS = 5.0  # for a write to end after a failure elsewhere; until then the checkpoint before it counts


class DistributedSaves:
    """
    Args:
        store: what this rank has of the whole model.
        written_by: the layout, for people who look into the manifest.
    """

    def __init__(self, store: CheckpointStore, *, rank: int, timeout: timedelta | None, written_by: str) -> None:
        self.store, self._rank, self._timeout, self.written_by = store, rank, timeout, written_by
        self._background = Background("checkpoint-writer")
        self._snapshots = Snapshots()
        self._group: dist.ProcessGroup | None = None

    def save(
        self,
        checkpoint: Mapping[str, Any],
        path: _PATH,
        optimizers: Iterable[ShardedOptimizer],
        *,
        extra: Mapping[str, Any],
        background: bool,
    ) -> None:
        """A collective.

        Args:
            checkpoint: what this rank has of a Lightning checkpoint.
            extra: of all ranks on rank 0, what modules say of themselves.

        Raises:
            CheckpointError: this save failed, or the one before it did in the background.
            ConfigurationError: it could not be loaded again.
        """
        if not _is_local_file_protocol(path):
            raise ConfigurationError(
                f"{path} is no path in a file system, and all ranks write into one directory; give a path that all "
                "nodes share, or save_distributed_checkpoint=False, which writes one file anywhere"
            )
        self._background.wait()
        target = Path(os.path.abspath(path))
        pieces, state = self._split(checkpoint, optimizers)
        state["state_dict"] |= extra
        state[RANDOM_STATES] = {"written_by": self.written_by, "ranks": collect_random_states(self.store.group)}
        contents = Contents(state, self.store.same_as, int(checkpoint["global_step"]), self.written_by)
        if not background:
            save(pieces, contents, target, self.store.group, rank=self._rank)
            return
        if self._rank == 0:
            contents = contents.packed()  # what it refers to changes from now on
            with contextlib.suppress(OSError):  # the write itself will say so
                target.parent.mkdir(parents=True, exist_ok=True)  # now: ModelCheckpoint's link goes there at once
        snapshot = self._snapshots.take(pieces)
        self._background.submit(partial(save, snapshot, contents, target, self._own_group(), rank=self._rank))

    def settle(self) -> None:
        """Before a step of an optimizer: what it changes is still being copied."""
        self._snapshots.settle()

    @property
    def busy(self) -> bool:
        return self._background.busy

    def remove_later(self, path: _PATH) -> None:
        """When what replaces it is in place; not at all if that fails."""
        self._background.submit(partial(remove, Path(os.path.abspath(path))))

    def finish(self, *, interrupted: bool) -> None:
        """Wait for what is written in the background, and give its memory back.

        Raises:
            CheckpointError: it failed; after an interrupt nobody asks.
        """
        try:
            if interrupted:
                with contextlib.suppress(Exception):
                    self._background.wait(_PARTING_SECONDS)
            else:
                self._background.wait()
        finally:
            self._snapshots.release()

    def _split(
        self, checkpoint: Mapping[str, Any], optimizers: Iterable[ShardedOptimizer]
    ) -> tuple[list[Piece], dict[str, Any]]:
        """This rank's pieces; and on rank 0 the checkpoint without them. A collective."""
        pieces, state = [], dict(checkpoint)
        for section in ("state_dict", "current_model_state"):
            if section in checkpoint:
                pieces += weight_pieces(self.store, section, checkpoint[section])
                state[section] = {n: value for n, value in checkpoint[section].items() if n not in self.store.same_as}
        if "optimizer_states" in checkpoint:
            collected = []
            for number, local in enumerate(checkpoint["optimizer_states"]):
                found, rest = optimizer_pieces(self.store, f"optimizer_states.{number}", local)
                pieces += found
                collected.append(self.store.whole_optimizer_state(rest))
            state["optimizer_states"] = [packed for packed, _ in collected]
            state["optimized_parameters"] = [names for _, names in collected]
            pieces += main_weight_pieces(self.store, "main_weights", optimizers)
        return pieces, state

    def _own_group(self) -> dist.ProcessGroup | None:
        """All ranks, for the threads that write: the main threads talk on the others meanwhile."""
        if self._group is None and self.store.group is not None:
            everybody = tuple(range(dist.get_world_size()))
            groups = create_groups([everybody], what="checkpoint_writers", timeout=self._timeout, backend="gloo")
            self._group = groups[everybody]
        return self._group
