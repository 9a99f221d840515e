"""Checkpoint directories for ``strategy="auto"`` and ``"ddp"``, where each process holds the whole model."""

from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from lightning_dualpipe.checkpoint.directory import is_directory
from lightning_dualpipe.checkpoint.stored import read_whole

__all__ = ["DistributedCheckpointIO"]


class DistributedCheckpointIO(TorchCheckpointIO):
    """``Trainer(plugins=[DistributedCheckpointIO()])`` resumes from directories as well as from files; it saves files.

    Each process reads the whole checkpoint, as it does with one file.
    """

    @override
    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """
        Raises:
            CheckpointError: the directory is no checkpoint, or damaged. Nothing in it is ever unpickled.
        """
        if is_directory(path):
            return read_whole(path)
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)
