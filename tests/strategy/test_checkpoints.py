"""A checkpoint is that of the uncut model, whoever wrote it, and a run goes on from it under any layout."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dualpipe import DeepSeekV3
from tests.ranks import run_ranks
from tests.strategy.runs import Recorder, Run, build, train, write_corpus

STEPS, SAVED_AT = 12, 6
LAYOUTS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "auto": (1, None),
    "dualpipe pp2 ep2": (4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "dualpipev pp2": (2, {"schedule": "dualpipev", "pipeline_parallel_size": 2}),
    "1f1b pp4": (4, {"schedule": "1f1b", "pipeline_parallel_size": 4}),
    "pp1 ep2": (2, {"pipeline_parallel_size": 1, "expert_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("checkpoints"))


def run_under(layout: str, corpus: str) -> Run:
    world, strategy = LAYOUTS[layout]
    return Run(strategy=strategy, world=world, corpus=corpus, steps=STEPS, overrides={"tie_word_embeddings": True})


def in_its_ranks(run: Run, fn: Callable[..., Any], *args: Any) -> list[Any]:
    return run_ranks(run.world, fn, run, *args, timeout=240) if run.world > 1 else [fn(0, run, *args)]


def save(rank: int, run: Run, folder: str) -> None:
    """Train to the end with a checkpoint in the middle of an epoch, and save once more after fit."""
    checkpoint = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    run = replace(run, steps=SAVED_AT, trainer={"enable_checkpointing": True})
    trainer, module, data = build(rank, run, callbacks=[checkpoint])
    trainer.fit(module, data)
    trainer.save_checkpoint(f"{folder}/after_fit.ckpt")


def resume(rank: int, run: Run, path: str) -> list[float]:
    trainer, module, data = build(rank, run)
    trainer.fit(module, data, ckpt_path=path)
    return next(callback for callback in trainer.callbacks if isinstance(callback, Recorder)).losses


@pytest.fixture(scope="module")
def saved(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with checkpoints for every layout."""
    folders = {}
    for layout in LAYOUTS:
        run = run_under(layout, corpus)
        folders[layout] = tmp_path_factory.mktemp("saved")
        in_its_ranks(run, save, str(folders[layout]))
    return folders


@pytest.fixture(scope="module")
def uninterrupted(corpus: str) -> list[float]:
    return train(0, run_under("auto", corpus)).losses


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "auto"])
def test_a_checkpoint_is_the_one_that_auto_writes(layout: str, saved: dict[str, Path]) -> None:
    name = f"step={SAVED_AT}.ckpt"
    ours = torch.load(saved[layout] / name, weights_only=True)
    theirs = torch.load(saved["auto"] / name, weights_only=True)

    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert_equal(ours["state_dict"], theirs["state_dict"])
    assert_equal(ours["optimizer_states"], theirs["optimizer_states"])
    for key in ("lr_schedulers", "loops", "TextDataModule", "tokens_seen", "global_step"):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize(
    ("written", "resumed"),
    [("dualpipe pp2 ep2", other) for other in LAYOUTS]
    + [(other, "dualpipe pp2 ep2") for other in LAYOUTS if other != "dualpipe pp2 ep2"]
    + [("1f1b pp4", "dualpipev pp2"), ("pp1 ep2", "pp1 ep2")],
)
def test_a_run_goes_on_under_any_layout(
    written: str, resumed: str, corpus: str, saved: dict[str, Path], uninterrupted: list[float]
) -> None:
    run = run_under(resumed, corpus)
    for losses in in_its_ranks(run, resume, str(saved[written] / f"step={SAVED_AT}.ckpt")):
        assert losses == pytest.approx(uninterrupted[SAVED_AT:], abs=1e-9)


def test_saving_after_fit_writes_the_same_weights(saved: dict[str, Path]) -> None:
    for folder in saved.values():
        during, after = (torch.load(folder / name) for name in (f"step={SAVED_AT}.ckpt", "after_fit.ckpt"))
        assert_equal(during["state_dict"], after["state_dict"])


def test_load_from_checkpoint_gives_the_whole_model(saved: dict[str, Path]) -> None:
    path = saved["dualpipe pp2 ep2"] / f"step={SAVED_AT}.ckpt"
    module = DeepSeekV3.load_from_checkpoint(path, map_location="cpu")
    saved_weights = torch.load(path)["state_dict"]
    assert_equal(module.state_dict(), {name: value.float() for name, value in saved_weights.items()})
    assert module(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 264)


def assert_equal(ours: Any, theirs: Any) -> None:
    """Nested values; tensors to the tolerance of another order of additions."""
    if isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    else:
        assert type(ours) is type(theirs) and ours == theirs


BF16 = Run({"pipeline_parallel_size": 2}, world=2, steps=STEPS, precision="bf16-true")


def _in_bf16(rank: int, run: Run, folder: str) -> list[list[float]]:
    """Losses from the middle on: uninterrupted, and resumed under the same layout and another."""
    checkpoint = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    saving = replace(run, trainer={"enable_checkpointing": True})
    trainer, module, data = build(rank, saving, callbacks=[checkpoint])
    trainer.fit(module, data)
    uninterrupted = next(callback for callback in trainer.callbacks if isinstance(callback, Recorder)).losses[SAVED_AT:]
    path = f"{folder}/step={SAVED_AT}.ckpt"
    other = replace(run, strategy={"schedule": "dualpipev", "pipeline_parallel_size": 2})
    return [uninterrupted, resume(rank, run, path), resume(rank, other, path)]


def test_in_bfloat16_a_resumed_run_goes_on_with_its_float32_weights(corpus: str, tmp_path: Path) -> None:
    run = replace(BF16, corpus=corpus)

    for uninterrupted, resumed, elsewhere in run_ranks(2, _in_bf16, run, str(tmp_path), timeout=240):
        assert resumed == uninterrupted, "bit for bit"
        assert elsewhere == pytest.approx(uninterrupted, abs=0.02)

    path = tmp_path / f"step={SAVED_AT}.ckpt"
    saved_weights, main_weights = (torch.load(path)[key] for key in ("state_dict", "main_weights"))
    for name, weight in main_weights.items():
        assert weight.dtype == torch.float32 and torch.equal(weight.bfloat16(), saved_weights[name])
    moments = torch.load(path)["optimizer_states"][0]["state"]
    assert {moment["exp_avg"].dtype for moment in moments.values()} == {torch.float32}
    assert len(main_weights) == len(moments)
    alone = resume(0, replace(run, strategy=None, world=1), str(path))  # which has bfloat16 alone
    assert alone == pytest.approx(uninterrupted, abs=0.1)
