"""Train DeepSeek-V3 and its like on Lightning by one flag: ``Trainer(strategy="dualpipe")``.

Importing this package imports neither torch nor lightning: each public name loads its module when
it is first used. The one thing done at once is to arrange that Lightning learns the strategies'
names (``_autoload``).
"""

from typing import TYPE_CHECKING

from lightning_dualpipe import _autoload

if TYPE_CHECKING:
    from lightning_dualpipe.checkpoint.newest import newest_checkpoint
    from lightning_dualpipe.data import TextDataModule
    from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
    from lightning_dualpipe.deepseek_v3.module import DeepSeekV3
    from lightning_dualpipe.errors import (
        CheckpointError,
        ConfigurationError,
        DeadlockError,
        MissingPackageError,
        ScheduleError,
        TrainingError,
    )
    from lightning_dualpipe.interface import Batch, Flight, Layer, Phase, PipelineModel, TensorSpec, run_uncut
    from lightning_dualpipe.plugins import FP8Precision
    from lightning_dualpipe.strategy import DistributedCheckpointIO, DualPipeStrategy

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CheckpointError",
    "ConfigurationError",
    "DeadlockError",
    "DeepSeekV3",
    "DeepSeekV3Config",
    "DistributedCheckpointIO",
    "DualPipeStrategy",
    "FP8Precision",
    "Flight",
    "Layer",
    "MissingPackageError",
    "Phase",
    "PipelineModel",
    "ScheduleError",
    "TensorSpec",
    "TextDataModule",
    "TrainingError",
    "newest_checkpoint",
    "run_uncut",
]

_MODULE_OF = {
    "Batch": "interface",
    "CheckpointError": "errors",
    "ConfigurationError": "errors",
    "DeadlockError": "errors",
    "DeepSeekV3": "deepseek_v3.module",
    "DeepSeekV3Config": "deepseek_v3.config",
    "DistributedCheckpointIO": "strategy",
    "DualPipeStrategy": "strategy",
    "FP8Precision": "plugins",
    "Flight": "interface",
    "Layer": "interface",
    "MissingPackageError": "errors",
    "Phase": "interface",
    "PipelineModel": "interface",
    "ScheduleError": "errors",
    "TensorSpec": "interface",
    "TextDataModule": "data",
    "TrainingError": "errors",
    "newest_checkpoint": "checkpoint.newest",
    "run_uncut": "interface",
}

if not TYPE_CHECKING:  # a type checker that saw these would accept any name

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # found without this function from now on
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


_autoload.autoload()
