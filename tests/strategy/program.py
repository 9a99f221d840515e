"""A training script as a user writes it, which tests start as real processes, and call for what it would compute.

    python tests/strategy/program.py --devices 2

Rank 0 writes its losses to ``losses.json`` after every step.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.your_own_model import LanguageModel
from lightning_dualpipe import Batch, DualPipeStrategy, TextDataModule, newest_checkpoint
from lightning_dualpipe.callbacks import SaveOnSigterm
from tests.strategy.faults import fault

BATCH_SIZE, NUM_BATCHES = 4, 12


class Tokens(Dataset[Mapping[str, Tensor]]):
    def __len__(self) -> int:
        return BATCH_SIZE * NUM_BATCHES

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        fault.reached("dataset", index // BATCH_SIZE)
        tokens = torch.randint(11, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class Model(LanguageModel):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        fault.reached("training_step", self.global_step)
        return super().training_step(batch, batch_idx)


class Watch(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        fault.reached("callback", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        if trainer.is_global_zero:
            Path("losses.json").write_text(json.dumps(self.losses))

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        Path(f"on_exception-{trainer.global_rank}").touch()


def train(arguments: Sequence[str] | None = None) -> list[float]:
    """Losses of the run."""
    options = _options(arguments)
    L.seed_everything(1, verbose=False)
    watch = Watch()
    callbacks: list[L.Callback] = [watch]
    if options.save:
        every = {"every_n_train_steps": options.every, "save_top_k": -1, "save_on_exception": True}
        callbacks.append(ModelCheckpoint("checkpoints", **every))  # type: ignore[arg-type]
    if options.save_on_sigterm:
        callbacks.append(SaveOnSigterm("checkpoints"))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy="auto" if options.strategy is None else DualPipeStrategy(**options.strategy),
        precision="64-true",
        max_steps=options.steps,
        callbacks=callbacks,
        enable_checkpointing=options.save,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    fault.reached("before fit")
    source = newest_checkpoint("checkpoints") if options.resume == "newest" else options.resume
    trainer.fit(Model(width=8, depth=6, heads=2), _data(options), ckpt_path=source)
    fault.reached("after fit")
    return watch.losses


def _data(options: argparse.Namespace) -> DataLoader[Mapping[str, Tensor]] | TextDataModule:
    if options.corpus is None:
        return DataLoader(Tokens(), batch_size=BATCH_SIZE, num_workers=options.workers)
    return TextDataModule(options.corpus, sequence_length=8, batch_size=BATCH_SIZE, cache_dir="cache")


def main() -> None:
    try:
        train()
    except Exception as error:
        if "--careless" not in sys.argv:
            raise
        print("caught", type(error).__name__, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", type=json.loads, default={}, help="DualPipeStrategy's arguments; null for auto")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--save-on-sigterm", action="store_true")
    parser.add_argument("--corpus", help="text to train on; it goes on where a checkpoint stood")
    parser.add_argument("--every", type=int, default=2, help="steps between two checkpoints")
    parser.add_argument("--resume", help="path of a checkpoint, or newest")
    parser.add_argument("--careless", action="store_true", help="catch every error and go on")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
