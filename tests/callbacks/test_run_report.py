import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_dualpipe.callbacks import RunReport
from lightning_dualpipe.callbacks.loss_picture import draw_losses
from lightning_dualpipe.errors import MissingPackageError
from tests.marks import needs


class Regression(L.LightningModule):
    """Logs no validation loss, and no batch of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)  # type: ignore[arg-type]


def fit(report: RunReport, *, steps: int, **arguments: object) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        log_every_n_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[report],
    )
    trainer.fit(Regression(), **arguments)  # type: ignore[arg-type]
    return trainer


def test_it_serves_any_module() -> None:
    report = RunReport()
    fit(report, steps=5)
    assert [step for step, _ in report.training] == [1, 2, 4]
    assert report.validation == []


def test_a_resumed_run_shows_all_of_its_history() -> None:
    first, second = RunReport(), RunReport()
    fit(first, steps=4).save_checkpoint("four.ckpt")
    fit(second, steps=8, ckpt_path="four.ckpt")
    assert [step for step, _ in second.training] == [1, 2, 4, 6, 8]
    assert second.training[:3] == first.training


@pytest.mark.parametrize("curve", [[], [(1, 5.5)], [(1, 5.5), (10, 3.25)]])
@needs("matplotlib")
def test_a_picture_is_drawn_however_little_there_is(curve: list[tuple[int, float]]) -> None:
    assert draw_losses(curve, curve[1:], Path("losses.png")).stat().st_size > 1000


@needs("matplotlib")
@pytest.mark.parametrize("curves", [([(1, 5.5)], []), ([], [(1, 5.5)])], ids=["training", "validation"])
def test_a_single_point_can_be_seen(
    curves: tuple[list[tuple[int, float]], list[tuple[int, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_losses(*curves, Path("losses.png"))
    assert [line.get_marker() for line in drawn[0].axes[0].lines] == ["o"]


def test_without_matplotlib_a_run_ends_well_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level("INFO"):
        fit(RunReport(), steps=2)
    assert 'none: pictures need matplotlib: pip install "lightning-dualpipe[draw]"' in caplog.text
    assert "checkpoint" in caplog.text
    with pytest.raises(MissingPackageError):
        draw_losses([], [], Path("losses.png"))
