"""The callback in real fits: what it writes and logs, and that training does not notice."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_dualpipe import DualPipeStrategy
from lightning_dualpipe.callbacks import StepTimeline
from lightning_dualpipe.errors import ConfigurationError
from tests.callbacks.test_run_report import Regression
from tests.marks import needs
from tests.ranks import run_ranks
from tests.strategy.runs import QUIET, Run, build_data, build_module, pretend_torchrun, write_corpus

LAYOUT = {"pipeline_parallel_size": 2, "expert_parallel_size": 2, "num_microbatches": 4}
SHARES = ("bubble", "exposed_communication", "simulated_bubble")


class Log(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.shares: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.losses.append(float(metrics["train_loss"]))
        self.shares.append({name: float(metrics[name]) for name in SHARES if name in metrics})


class Outcome(NamedTuple):
    plain: list[float]
    watched: list[float]
    shares: list[dict[str, float]]
    files: dict[str, str]  # what rank 0 sees, at the end
    accumulated: list[str]


def fit(run: Run, *callbacks: L.Callback, **arguments: Any) -> Log:
    L.seed_everything(7, verbose=False)
    log = Log()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=run.world,
        strategy=DualPipeStrategy(**run.strategy or {}),
        precision="64-true",
        max_steps=run.steps,
        callbacks=[*callbacks, log],
        **{**QUIET, **arguments},
    )
    trainer.fit(build_module(run), build_data(run))
    return log


def on_rank(rank: int, folder: str) -> Outcome:
    pretend_torchrun(rank, 4)
    os.chdir(folder)
    run = Run(strategy=LAYOUT, world=4, steps=5, corpus=f"{folder}/corpus.txt", global_batch=8)
    plain = fit(run)
    logger = CSVLogger("runs", name="watched")
    watched = fit(run, StepTimeline(step=2, every_n_steps=2), logger=logger, log_every_n_steps=3)
    fit(run, StepTimeline(step=2), accumulate_grad_batches=2, logger=CSVLogger("runs", name="accumulated"))
    written = Path("runs/watched/version_0")
    files = {path.name: path.read_bytes().decode(errors="replace") for path in written.iterdir() if path.is_file()}
    accumulated = [path.name for path in Path("runs/accumulated/version_0").iterdir()]
    return Outcome(plain.losses, watched.losses, watched.shares, files, sorted(accumulated))


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    with TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        return run_ranks(4, on_rank, folder, timeout=240)


def test_losses_are_those_without_it(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.watched == outcome.plain and len(outcome.plain) == 5


@needs("matplotlib")
def test_it_leaves_picture_trace_and_table_of_each_step(outcomes: list[Outcome]) -> None:
    found = sorted(name for name in outcomes[0].files if name.startswith("timeline"))
    assert found == sorted(f"timeline_step{step}.{kind}" for step in (2, 4) for kind in ("json", "png", "svg", "txt"))
    picture = outcomes[0].files["timeline_step2.svg"]
    assert all(f"<!-- rank {rank} -->" in picture for rank in range(4))


def test_the_trace_has_a_process_for_every_rank_and_sees_the_experts_tokens(outcomes: list[Outcome]) -> None:
    events = json.loads(outcomes[0].files["timeline_step4.json"])["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    for rank in range(4):
        mine = [event for event in slices if event["pid"] == rank]
        assert {event["tid"] for event in mine} == {0, 1, 2}
        kinds = {event["cat"] for event in mine}
        assert {"forward", "backward", "weight gradients", "launch", "wait for tokens", "wait for a message"} <= kinds
        assert any(event["name"].endswith("F0 blocks.1 experts") for event in mine) or rank > 1
        actions = {event["name"].split()[0] for event in mine if event["tid"] == 0}
        simulated = {action for event in mine if event["tid"] == 2 for action in event["name"].split("+")}
        assert actions == simulated


def test_every_rank_logs_the_shares_of_the_steps_it_recorded(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.shares == outcomes[0].shares
        none, *recorded = outcome.shares
        assert none == {}
        for shares in recorded:
            assert 0 < shares["exposed_communication"] < shares["bubble"] < 1
            assert 0 <= shares["simulated_bubble"] < 1


def test_loggers_get_them_at_whatever_step(outcomes: list[Outcome]) -> None:
    """Lightning itself would write the third step alone, and counts rows from 0; files and ``timeline_step`` from 1."""
    heads, *lines = (line.split(",") for line in outcomes[0].files["metrics.csv"].splitlines())
    rows = [dict(zip(heads, line, strict=True)) for line in lines]
    assert [(row["step"], row["timeline_step"]) for row in rows if row["bubble"]] == [("1", "2"), ("3", "4")]
    assert all(row["exposed_communication"] and row["simulated_bubble"] for row in rows if row["bubble"])


def test_of_an_accumulated_step_the_first_batch_is_recorded(outcomes: list[Outcome]) -> None:
    assert [name for name in outcomes[0].accumulated if name.endswith(".json")] == ["timeline_step2.json"]


def without_pipeline(callback: StepTimeline, strategy: Any = "auto") -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Regression())
    return trainer


def test_without_a_pipeline_there_is_one_warning_and_nothing_else() -> None:
    with pytest.warns(UserWarning, match="SingleDeviceStrategy runs none: there will be no timeline") as heard:
        trainer = without_pipeline(StepTimeline(step=1))
    assert sum("StepTimeline" in str(warning.message) for warning in heard) == 1
    assert not any(name in trainer.callback_metrics for name in SHARES)
    assert not list(Path().glob("**/timeline*"))


def test_a_pipeline_of_one_rank_has_a_timeline_too(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run = Run(strategy={"pipeline_parallel_size": 1}, steps=2, corpus=write_corpus(tmp_path))
    with pytest.warns(UserWarning, match="StepTimeline") as heard:
        fit(run, StepTimeline(step=1), StepTimeline(), StepTimeline(step=3, every_n_steps=5))
    assert Path("timeline_step1.json").exists()
    assert [str(warning.message) for warning in heard if "StepTimeline" in str(warning.message)] == [
        f"StepTimeline has recorded nothing: this fit ended after 2 optimizer steps, before its step={step}; "
        "give a smaller one"
        for step in (10, 3)
    ]


class NeverRuns(SingleDeviceStrategy):
    """Has a schedule, which nobody runs."""

    def record_step(self) -> None: ...

    def recorded_step(self) -> None: ...


def test_where_the_model_is_never_called_that_is_said() -> None:
    with pytest.warns(UserWarning, match="StepTimeline has recorded nothing: no training step called the model"):
        without_pipeline(StepTimeline(step=1), strategy=NeverRuns("cpu"))


@pytest.mark.parametrize("arguments", [{"step": 0}, {"every_n_steps": 0}])
def test_steps_are_counted_from_one(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=r"=0: steps are counted from 1"):
        StepTimeline(**arguments)
