"""A module that learns nothing of interest and remembers which batches it saw."""

from hashlib import sha256
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

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert set(batch) == {"input_ids"}
        return batch["input_ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def signature(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    return [tuple(row) for row in batch["input_ids"].tolist()]


def corpus(folder: Path, *, documents: int = 16) -> Path:
    """Documents of different lengths in which no 16 tokens occur twice; written once, so that it is tokenised once."""
    path = folder / "corpus"
    if not path.exists():
        path.mkdir()
        for index in range(documents):
            lines = (sha256(f"{index}/{line}".encode()).hexdigest()[:23] for line in range(3 + index % 5))
            (path / f"{index:03}.txt").write_text("\n".join(lines) + "\n")
    return path


def data(folder: Path, **options: Any) -> TextDataModule:
    return TextDataModule(
        corpus(folder), 16, cache_dir=folder / "cache", **{"batch_size": 8, "validation_fraction": 0.2} | options
    )


def trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(options.get("callbacks")),
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(quiet | options))
