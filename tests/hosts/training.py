"""One small training, started as users start it: a configuration, and the scripts of ``examples/``."""

import csv
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.strategy.runs import SHAPE, write_corpus

__all__ = ["EXAMPLES", "environment", "losses", "write_configuration"]

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent

CONFIGURATION = """
seed_everything: 7
trainer:
  accelerator: cpu
  devices: 2
  num_nodes: 2
  strategy:
    class_path: lightning_dualpipe.DualPipeStrategy
    init_args:
      pipeline_parallel_size: 2
      expert_parallel_size: 2
      num_microbatches: 4
      save_distributed_checkpoint: {save}
      timeout: "{timeout}"
  max_steps: {steps}
  gradient_clip_val: 1.0
  limit_val_batches: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: runs, name: train, flush_logs_every_n_steps: 1}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {checkpoints}, filename: "{{step}}", every_n_train_steps: {every}, save_top_k: 3,
                   monitor: step, mode: max, save_last: link}}
model:
  class_path: lightning_dualpipe.DeepSeekV3
  init_args: {{preset: tiny, overrides: {shape}, learning_rate: 1.0e-2, warmup_steps: 5}}
data:
  class_path: lightning_dualpipe.TextDataModule
  init_args: {{path: {corpus}, sequence_length: 16, batch_size: 4, cache_dir: {cache}}}
"""


def write_configuration(
    folder: Path, *, steps: int, every: int, timeout: int, save: str = "true", checkpoints: str = "checkpoints"
) -> Path:
    """DeepSeek-V3 in small over two hosts, two ranks on each: pipelines cross the cable, experts do not.

    Args:
        every: steps between two checkpoints, directories of all ranks.
        save: true, or async.
        checkpoints: their folder; null for that of the logger.
        timeout: seconds that a collective may wait.
    """
    shape = "{" + ", ".join(f"{name}: {value}" for name, value in SHAPE.items()) + "}"
    path = folder / "train.yaml"
    path.write_text(
        CONFIGURATION.format(
            timeout=f"0:00:{timeout}",
            steps=steps,
            every=every,
            save=save,
            checkpoints=checkpoints,
            shape=shape,
            corpus=write_corpus(folder),
            cache=folder / "cache",
        )
    )
    return path


def environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """With ``lightning-dualpipe`` and ``torchrun`` of this tree and this Python among the programs."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, module in (("lightning-dualpipe", "lightning_dualpipe.cli"), ("torchrun", "torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    here = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return {**os.environ, **here, **more}


def losses(folder: Path) -> dict[int, str]:
    """By step, as they were written; of a step that was done again after a resume, the last."""
    found: dict[int, str] = {}
    versions = sorted(folder.glob("**/metrics.csv"), key=lambda path: int(path.parent.name.removeprefix("version_")))
    for path in versions:
        with open(path) as file:
            found |= {int(row["step"]): row["train_loss"] for row in csv.DictReader(file) if row.get("train_loss")}
    return found
