"""A directory into which every rank wrote what it has: any layout goes on from it as if nothing had happened."""

import errno
import os
import random
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dualpipe import CheckpointError, DistributedCheckpointIO
from lightning_dualpipe.checkpoint import writer
from lightning_dualpipe.checkpoint.stored import open_stored, read_whole
from lightning_dualpipe.cli.exporting import export_checkpoint
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.strategy import distributed_saves
from tests.ranks import run_ranks
from tests.strategy.runs import Recorder, Run, build, train, write_corpus
from tests.strategy.test_checkpoints import assert_equal

SAVED_AT, THEN = 4, 10
LAYOUTS: Mapping[str, tuple[int, Mapping[str, Any] | None]] = {
    "auto": (1, None),
    "dualpipe pp2 ep2": (4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "dualpipev pp4": (4, {"schedule": "dualpipev", "pipeline_parallel_size": 4}),
    "zb1p pp4": (4, {"schedule": "zb1p", "pipeline_parallel_size": 4}),
    "dp2": (2, {"pipeline_parallel_size": 1}),
}
IN_BACKGROUND = ("dualpipev pp4", "dp2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("distributed"))


def run_under(layout: str, corpus: str) -> Run:
    """Two batches to a step, a learning rate that changes with every step, moving router biases."""
    world, strategy = LAYOUTS[layout]
    overrides = {"tie_word_embeddings": True}
    return Run(strategy, world, corpus=corpus, steps=SAVED_AT + THEN, accumulate=2, global_batch=4, overrides=overrides)


def distributed(run: Run, how: bool | str = True) -> Run:
    if run.strategy is None:
        return run
    return replace(run, strategy={**run.strategy, "save_distributed_checkpoint": how})


def losses_of(trainer: Any) -> list[float]:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Recorder)).losses


def save(rank: int, run: Run, folder: str, options: Mapping[str, Any]) -> list[float]:
    checkpoint = ModelCheckpoint(folder, **{"filename": "{step}", "save_top_k": -1, **options})
    run = replace(run, trainer={**run.trainer, "enable_checkpointing": True})
    trainer, module, data = build(rank, run, callbacks=[checkpoint])
    trainer.fit(module, data)
    return losses_of(trainer)


def resume(rank: int, run: Run, paths: list[str]) -> list[list[float]]:
    """One fit after the other."""
    found = []
    plugins = {} if isinstance(run.strategy, Mapping) else {"plugins": [DistributedCheckpointIO()]}
    for path in paths:
        trainer, module, data = build(rank, replace(run, trainer=plugins))
        trainer.fit(module, data, ckpt_path=path)
        found.append(losses_of(trainer))
    return found


@pytest.fixture(scope="module")
def saved(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In the middle of an epoch."""
    found = {}
    for layout in LAYOUTS:
        run = replace(run_under(layout, corpus), steps=SAVED_AT)
        run = distributed(run, "async" if layout in IN_BACKGROUND else True)
        folder = tmp_path_factory.mktemp("saved")
        run_ranks(run.world, save, run, str(folder), {"every_n_train_steps": SAVED_AT}, timeout=240)
        found[layout] = folder / f"step={SAVED_AT}.ckpt"
        assert [path.name for path in folder.iterdir()] == [found[layout].name]
    return found


@pytest.fixture(scope="module")
def uninterrupted(corpus: str) -> list[float]:
    return train(0, run_under("auto", corpus)).losses


@pytest.mark.parametrize("resumed", LAYOUTS)
def test_a_run_goes_on_under_any_layout(
    resumed: str, corpus: str, saved: dict[str, Path], uninterrupted: list[float]
) -> None:
    run = run_under(resumed, corpus)
    paths = [str(path) for path in saved.values()]
    rest = uninterrupted[2 * SAVED_AT :]
    for rank, found in enumerate(run_ranks(run.world, resume, run, paths, timeout=240)):
        for written, losses in zip(saved, found, strict=True):
            assert losses == pytest.approx(rest, abs=1e-9), f"written under {written}, rank {rank}"


def test_ddp_goes_on_from_a_directory(corpus: str, saved: dict[str, Path], uninterrupted: list[float]) -> None:
    run = replace(run_under("dp2", corpus), strategy="ddp")
    ranks = run_ranks(2, resume, run, [str(saved["dualpipe pp2 ep2"])], timeout=240)
    (ours,), (theirs,) = ranks  # each rank has the loss of its half of the batch
    assert ours != theirs
    losses = [(one + other) / 2 for one, other in zip(ours, theirs, strict=True)]
    assert losses == pytest.approx(uninterrupted[2 * SAVED_AT :], abs=1e-9)


def test_a_directory_holds_what_auto_writes(saved: dict[str, Path]) -> None:
    theirs = torch.load(saved["auto"], weights_only=True)
    for layout, path in saved.items():
        if layout != "auto":
            assert path.is_dir()
            ours = read_whole(path)
            assert list(ours["state_dict"]) == list(theirs["state_dict"])
            for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "TextDataModule", "tokens_seen"):
                assert_equal(ours[key], theirs[key])


def test_every_layout_is_exported_as_the_one_file_that_is_made_of_it(saved: dict[str, Path], tmp_path: Path) -> None:
    for layout, path in saved.items():
        if path.is_dir():
            torch.save(read_whole(path), tmp_path / "one.ckpt")
            for source, name in ((path, "directory"), (tmp_path / "one.ckpt", "file")):
                export_checkpoint(source, tmp_path / name, dtype="float64", max_shard_size="100KB", overwrite=True)
            exported, expected = (
                {each.name: each.read_bytes() for each in (tmp_path / name).iterdir()} for name in ("directory", "file")
            )
            assert exported == expected, layout
            assert len(exported) > 10 and "tokenizer.json" in exported, layout


def test_every_tensor_is_written_once_and_by_those_who_have_it(saved: dict[str, Path]) -> None:
    """Optimizer states are shared out evenly, so files are: one rank has no more than its share and its weights."""
    for layout in ("dualpipe pp2 ep2", "dualpipev pp4", "zb1p pp4", "dp2"):
        stored = open_stored(saved[layout])
        elements = sum(t.numel() for t in torch.load(saved["auto"])["state_dict"].values())
        by_file: dict[str, int] = {}
        for key, entry in stored.index.entries.items():
            for block in entry.blocks:
                if key.section != "state_dict":
                    by_file[block.file] = by_file.get(block.file, 0) + block.stop - block.start
        assert len(by_file) == LAYOUTS[layout][0]
        assert sum(by_file.values()) <= 2 * elements, "two moments of an element, once each"


BF16 = Run({"pipeline_parallel_size": 2}, world=2, steps=8, precision="bf16-true")


def in_bf16(rank: int, run: Run, folder: str) -> list[list[float]]:
    losses = save(rank, distributed(run), folder, {"every_n_train_steps": 4})[4:]
    return [losses, *resume(rank, run, [f"{folder}/step=4.ckpt"])]


def test_in_bfloat16_the_float32_weights_are_there_bit_for_bit(corpus: str, tmp_path: Path) -> None:
    for uninterrupted, resumed in run_ranks(2, in_bf16, replace(BF16, corpus=corpus), str(tmp_path), timeout=240):
        assert resumed == uninterrupted
    found = read_whole(tmp_path / "step=4.ckpt")
    for name, weight in found["main_weights"].items():
        assert weight.dtype == torch.float32 and torch.equal(weight.bfloat16(), found["state_dict"][name])


# ---- retention ---------------------------------------------------------------------------------

PP2 = Run({"schedule": "1f1b", "pipeline_parallel_size": 2}, world=2, steps=6)


@pytest.mark.parametrize("how", [True, "async"])
def test_model_checkpoint_keeps_what_it_is_told_to(how: bool | str, corpus: str, tmp_path: Path) -> None:
    run = distributed(replace(PP2, corpus=corpus), how)
    options = {"every_n_train_steps": 2, "save_top_k": 1, "save_last": "link"}
    folder = tmp_path / "made by the first save"
    run_ranks(2, save, run, str(folder), options, timeout=240)
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=6.ckpt"]
    assert (folder / "last.ckpt").is_symlink()
    assert read_whole(folder / "last.ckpt")["global_step"] == 6


def test_a_name_that_is_saved_again_is_replaced(corpus: str, tmp_path: Path) -> None:
    run = distributed(replace(PP2, corpus=corpus), "async")
    options = {"every_n_train_steps": 2, "filename": "same", "enable_version_counter": False}
    run_ranks(2, save, run, str(tmp_path), options, timeout=240)
    assert [path.name for path in tmp_path.iterdir()] == ["same.ckpt"]
    assert read_whole(tmp_path / "same.ckpt")["global_step"] == 6


# ---- while training goes on --------------------------------------------------------------------


class SavesTwice(L.Callback):
    """At once and in the background; then everything is written to, before the thread has begun."""

    def __init__(self, folder: str, stepped: threading.Event) -> None:
        self.folder, self.stepped = folder, stepped

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            for how in (True, "async"):
                trainer.strategy.save_distributed_checkpoint = how
                trainer.save_checkpoint(f"{self.folder}/{how}.ckpt")
            for tensor in module.state_dict().values():
                tensor.data.add_(1)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            self.stepped.set()


def save_twice(rank: int, run: Run, folder: str) -> None:
    original, stepped = distributed_saves.save, threading.Event()

    def save_late(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert stepped.wait(120)
        original(*args, **kwargs)

    distributed_saves.save = save_late
    try:
        trainer, module, data = build(rank, run, callbacks=[SavesTwice(folder, stepped)])
        trainer.fit(module, data)
    finally:
        distributed_saves.save = original


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_what_is_written_in_the_background_is_what_was_saved(precision: str, corpus: str, tmp_path: Path) -> None:
    """Two steps of the optimizer are over before the thread gets to its first byte."""
    run = distributed(replace(PP2, corpus=corpus, precision=precision))
    run_ranks(2, save_twice, run, str(tmp_path), timeout=240)
    at_once, background = (read_whole(tmp_path / f"{how}.ckpt") for how in (True, "async"))
    assert at_once["optimizer_states"][0]["state"] and ("main_weights" in at_once) == (precision == "bf16-true")
    assert_equal(background, at_once)


# ---- what can go wrong -------------------------------------------------------------------------


def save_on_a_full_disk(rank: int, run: Run, folder: str, options: Mapping[str, Any]) -> str:
    """Full from the second checkpoint on, for rank 1 only."""
    original, calls = writer._write_file, []

    def write_file(path: Path, *rest: Any) -> Any:
        calls.append(path)
        if rank == 1 and len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *rest)

    writer._write_file = write_file
    try:
        save(rank, run, folder, options)
    except CheckpointError as error:
        return str(error)
    finally:
        writer._write_file = original
    return "nothing was said"


@pytest.mark.parametrize("how", [True, "async"])
def test_a_full_disk_is_told_by_all_ranks_and_nothing_is_lost(how: bool | str, corpus: str, tmp_path: Path) -> None:
    run = distributed(replace(PP2, corpus=corpus), how)
    options = {"every_n_train_steps": 2, "save_top_k": 1}
    for said in run_ranks(2, save_on_a_full_disk, run, str(tmp_path), options, timeout=240):
        assert "step=4.ckpt cannot be written: [Errno 28] No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"], "kept although save_top_k=1"
    assert read_whole(tmp_path / "step=2.ckpt")["global_step"] == 2


class Odd:
    """No plain value."""


UNSAVEABLE = {
    "/proc/a.ckpt": "CheckpointError: /proc/a.ckpt cannot be written: [Errno ",
    "s3://bucket/a.ckpt": "ConfigurationError: s3://bucket/a.ckpt is no path in a file system",
    "odd.ckpt": "ConfigurationError: the checkpoint could be written, but not read again",
}


def refused(rank: int, run: Run) -> list[str]:
    trainer, module, data = build(rank, replace(run, steps=1))
    trainer.fit(module, data)
    said = []
    for path in UNSAVEABLE:
        if path == "odd.ckpt":
            module.hparams["odd"] = Odd()
        try:
            trainer.save_checkpoint(path)
        except (CheckpointError, ConfigurationError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_cannot_be_saved_is_told_by_all_ranks(corpus: str, tmp_path: Path) -> None:
    for said in run_ranks(2, refused, distributed(replace(PP2, corpus=corpus)), timeout=240):
        for words, expected in zip(said, UNSAVEABLE.values(), strict=True):
            assert words.startswith(expected)
        assert "checkpoint['hyper_parameters']" in said[-1]
    assert not list(tmp_path.iterdir())


def resume_refused(rank: int, runs: list[tuple[Run, str]]) -> list[str]:
    said = []
    for run, path in runs:
        try:
            resume(rank, run, [path])
        except (CheckpointError, ConfigurationError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_cannot_be_resumed_from_is_told_by_all_ranks(corpus: str, saved: dict[str, Path], tmp_path: Path) -> None:
    run = run_under("dp2", corpus)
    paths = {name: tmp_path / f"{name}.ckpt" for name in ("model", "bit", "shard", "manifest")}
    for path in paths.values():
        shutil.copytree(saved["dualpipe pp2 ep2"], path)
    shard = paths["bit"] / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (paths["shard"] / "rank-00002.safetensors").unlink()
    (paths["manifest"] / "manifest.json").unlink()
    runs = [(run, str(path)) for path in paths.values()]
    runs[0] = (replace(run, overrides={**run.overrides, "hidden_size": 48}), runs[0][1])

    for said in run_ranks(2, resume_refused, runs, timeout=240):
        assert said[0].startswith("ConfigurationError: the checkpoint belongs to another model")
        assert said[1].startswith(f"CheckpointError: {shard} is damaged")
        assert said[2].startswith(f"CheckpointError: {paths['shard']}/rank-00002.safetensors is missing")
        assert said[3].startswith(f"CheckpointError: {paths['manifest']} is no checkpoint: it has no manifest.json")


# ---- random numbers ----------------------------------------------------------------------------


class Draws(L.Callback):
    """What a rank would draw for dropout, in every step; another number of times on each rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.found: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        torch.rand(self.rank)
        self.found.append((float(torch.rand(1)), random.random(), float(np.random.rand())))


def draw(rank: int, run: Run, folder: str) -> list[list[Any]]:
    """Uninterrupted, resumed under the same layout, and under another."""
    found = []
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2)
    other = replace(run, strategy={**run.strategy, "schedule": "dualpipev"})  # type: ignore[dict-item]
    for each, path in ((run, None), (run, f"{folder}/step=2.ckpt"), (other, f"{folder}/step=2.ckpt")):
        draws = Draws(rank)
        trainer, module, data = build(
            rank,
            replace(each, steps=4 if path else 2, trainer={"enable_checkpointing": path is None}),
            callbacks=[draws, *([] if path else [checkpoint])],
        )
        if path is None:
            trainer.fit(module, data)
            torch.rand(rank)  # as an uninterrupted run would go on
            expected = (float(torch.rand(1)), random.random(), float(np.random.rand()))
            found.append([expected])
        else:
            L.seed_everything(1000 + rank, verbose=False)
            trainer.fit(module, data, ckpt_path=path)
            found.append(draws.found)
    return found


def test_ranks_go_on_with_their_own_random_numbers_under_the_same_layout(corpus: str, tmp_path: Path) -> None:
    ranks = run_ranks(2, draw, distributed(replace(PP2, corpus=corpus)), str(tmp_path), timeout=240)
    assert ranks[0][0] != ranks[1][0]
    for uninterrupted, resumed, elsewhere in ranks:
        assert resumed[0] == uninterrupted[0]
        assert elsewhere[0] != uninterrupted[0]
