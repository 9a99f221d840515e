"""The rate itself is tested over all layouts in ``test_fits``."""

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dualpipe.callbacks import Throughput
from lightning_dualpipe.metrics import TokenRate


class Language(L.LightningModule):
    """Ten FLOPs a token and position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch["input_ids"].float()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_flops(self, sequence_length: int) -> float:
        return 10.0 * sequence_length


class Pictures(Language):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch["pixels"]).sum()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def logged_by(module: L.LightningModule, batch: dict[str, torch.Tensor], **arguments: Any) -> dict[str, float]:
    callback = Throughput()
    callback.rate = TokenRate(Clock())  # half a second passes between two looks at it
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **arguments,
    )
    trainer.fit(module, DataLoader([batch] * 6, batch_size=None))  # type: ignore[arg-type]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


TOKENS = {"input_ids": torch.ones(2, 4, dtype=torch.int64)}


def test_no_utilization_is_claimed_where_the_peak_is_unknown() -> None:
    assert logged_by(Language(), TOKENS) == {"tokens_per_second": 3 * 8 / 0.5}


def test_utilization_is_arithmetic_done_over_arithmetic_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def flops_utilization(flops_per_second: float, *, device: torch.device, dtype: torch.dtype) -> float:
        asked.update(device=device, dtype=dtype)
        return flops_per_second / 1e4

    monkeypatch.setattr("lightning_dualpipe.callbacks.throughput.flops_utilization", flops_utilization)
    logged = logged_by(Language(), TOKENS, precision="bf16-mixed")
    assert logged["mfu"] == pytest.approx(48 * 40 / 1e4)
    assert asked == {"device": torch.device("cpu"), "dtype": torch.bfloat16}


def test_while_gradients_are_accumulated_all_batches_count() -> None:
    assert logged_by(Language(), TOKENS, accumulate_grad_batches=2)["tokens_per_second"] == 6 * 8 / 0.5


def test_what_has_no_tokens_has_no_rate() -> None:
    assert logged_by(Pictures(), {"pixels": torch.ones(2, 4)}) == {}
