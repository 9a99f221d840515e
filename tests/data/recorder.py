"""A module that learns nothing of interest and remembers which batches it saw."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_dualpipe.data import TextDataModule


class Recorder(L.LightningModule):
    """``seen`` lists the samples of every training batch, each by its first tokens; ``validated`` those of the last
    validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[tuple[int, ...]]] = []
        self.validated: list[list[tuple[int, ...]]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(signature(batch))
        return self.weight * batch["input_ids"].double().mean()

    def on_validation_epoch_start(self) -> None:
        self.validated = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.append(signature(batch))
        self.log("val_loss", batch["labels"].double().mean(), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert set(batch) == {"input_ids"}
        return batch["input_ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def signature(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    return [tuple(row) for row in batch["input_ids"].tolist()]


def corpus(folder: Path, *, documents: int = 40) -> Path:
    """Documents of different lengths in which no 16 tokens occur twice."""
    (folder / "corpus").mkdir(exist_ok=True)
    for index in range(documents):
        lines = (f"{index:03}/{line:03} of the document\n" for line in range(3 + index % 5))
        (folder / "corpus" / f"{index:03}.txt").write_text("".join(lines))
    return folder / "corpus"


def data(folder: Path, **options: Any) -> TextDataModule:
    options = {"batch_size": 4, "validation_fraction": 0.1} | options
    return TextDataModule(corpus(folder), 16, cache_dir=folder / "cache", **options)


def trainer(**options: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(options.get("callbacks")),
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(quiet | options))
