"""One short training run with all callbacks, under several strategies: what each rank logged, printed and wrote."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dualpipe import DualPipeStrategy
from lightning_dualpipe.callbacks import ExpertLoad, PeakMemory, RunReport, Throughput
from lightning_dualpipe.metrics import TokenRate
from tests.ranks import run_ranks
from tests.strategy.runs import Run, build_data, build_module, pretend_torchrun, write_corpus

LAYOUTS: Mapping[str, tuple[int, Mapping[str, Any] | None]] = {  # name -> processes, DualPipeStrategy's arguments
    "auto": (1, None),
    "ddp": (2, None),
    "dualpipe pp4": (4, {"pipeline_parallel_size": 4, "num_microbatches": 4}),
    "1f1b pp2 ep2": (4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2, "schedule": "1f1b"}),
}
EVERY = 2  # steps between reports
GLOBAL_BATCH = Run().global_batch


@dataclass(frozen=True)
class Outcome:
    logged: list[dict[str, float]]  # by report, what a logger gets
    said: str  # by callbacks and strategy
    written: list[str]  # files under the logger's folder
    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]


@lru_cache
def outcomes(layout: str) -> list[Outcome]:
    """Of every rank, computed once for all tests."""
    world, arguments = LAYOUTS[layout]
    with TemporaryDirectory() as folder:
        run = Run(strategy=arguments, world=world, steps=2 * EVERY, corpus=write_corpus(Path(folder)))
        return run_ranks(world, fit, layout, run, folder, timeout=200)


def fit(rank: int, layout: str, run: Run, folder: str) -> Outcome:
    pretend_torchrun(rank, run.world)
    os.chdir(folder)
    heard = _Ear()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(heard)
    L.seed_everything(7, verbose=False)
    clock, throughput, report, log = _Clock(), Throughput(), RunReport(), _Log()
    throughput.rate = TokenRate(clock)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=run.world,
        strategy=DualPipeStrategy(**run.strategy) if run.strategy else layout,
        precision="64-true",
        max_steps=run.steps,
        log_every_n_steps=EVERY,
        limit_val_batches=1,
        val_check_interval=EVERY,
        num_sanity_val_steps=1,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        logger=CSVLogger("runs", name="test"),
        callbacks=[clock, throughput, ExpertLoad(), PeakMemory(), report, log, ModelCheckpoint(save_last=True)],
    )
    trainer.fit(build_module(run), build_data(run))
    written = [str(path.relative_to(folder)) for path in Path(folder, "runs").rglob("*") if path.is_file()]
    return Outcome(log.reports, heard.text, sorted(written), report.training, report.validation)


class _Ear(logging.Handler):
    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


class _Clock(L.Callback):
    """On which a training batch takes a second, and a validation batch a hundred."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def on_train_batch_end(self, *_: Any) -> None:
        self.now += 1

    def on_validation_batch_end(self, *_: Any) -> None:
        self.now += 100


class _Log(L.Callback):
    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            self.reports.append({name: float(value) for name, value in trainer.callback_metrics.items()})


__all__ = ["EVERY", "GLOBAL_BATCH", "LAYOUTS", "Outcome", "outcomes"]
