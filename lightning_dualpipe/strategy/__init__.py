"""The Lightning strategy. The only folder, with ``data``, ``metrics`` and ``callbacks``, that imports lightning."""

from lightning_dualpipe.strategy.checkpoint_io import DistributedCheckpointIO
from lightning_dualpipe.strategy.strategy import DualPipeStrategy

__all__ = ["DistributedCheckpointIO", "DualPipeStrategy"]
