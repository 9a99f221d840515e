"""A run that stops and goes on sees the batches of one that does not stop, whenever it stops."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_dualpipe.data import BatchSizeRamp, TextDataModule
from tests.data.recorder import Recorder, corpus, data, trainer
from tests.ranks import run_ranks

RAMP = BatchSizeRamp(2, 10, tokens=2000, increment=2)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the trainer, of the data
    "epochs": ({"max_epochs": 3}, {}),
    "steps": ({"max_steps": 25}, {}),
    "in order": ({"max_epochs": 3}, {"shuffle": False}),
    "workers": ({"max_epochs": 2}, {"num_workers": 2}),
    "accumulation": ({"max_epochs": 3, "accumulate_grad_batches": 2}, {}),
    "validation within epochs": ({"max_epochs": 3, "val_check_interval": 0.3}, {}),
    "loaders made anew": ({"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, {}),
    "short epochs": ({"max_epochs": 4, "limit_train_batches": 7}, {}),
    "batch size schedule": ({"max_steps": 40}, {"batch_size_schedule": RAMP}),
    "batch size schedule and workers": ({"max_steps": 40}, {"batch_size_schedule": RAMP, "num_workers": 1}),
}


class SaveOften(Callback):
    """A checkpoint after some batches, another before the epoch ends, another when it has ended."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.saved: dict[Path, int] = {}

    def save(self, pl_trainer: Any, module: Recorder, name: str) -> None:
        path = self.folder / f"{name}-{len(module.seen)}.ckpt"
        pl_trainer.save_checkpoint(path)
        self.saved[path] = len(module.seen)

    def on_train_batch_end(self, pl_trainer: Any, pl_module: Any, *_: Any) -> None:
        if len(pl_module.seen) % self.every == 0:
            self.save(pl_trainer, pl_module, "batch")

    def on_validation_end(self, pl_trainer: Any, pl_module: Any) -> None:
        self.save(pl_trainer, pl_module, "validation")

    def on_train_epoch_end(self, pl_trainer: Any, pl_module: Any) -> None:
        self.save(pl_trainer, pl_module, "epoch")


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_of_a_run_leads_to_the_same_batches(tmp_path: Path, case: str) -> None:
    for_trainer, for_data = CASES[case]
    every = 8 if "workers" in case else 4
    saves, whole = SaveOften(tmp_path, every), Recorder()
    trainer(callbacks=[saves], **for_trainer).fit(whole, data(tmp_path, **for_data))
    assert len(whole.seen) > 12 and len(saves.saved) > 3

    for path, step in saves.saved.items():
        resumed = Recorder()
        trainer(**for_trainer).fit(resumed, data(tmp_path, **for_data), ckpt_path=path)
        first = len(whole.seen) - len(resumed.seen)
        assert resumed.seen == whole.seen[first:], path.name
        assert first == step, path.name


@pytest.mark.parametrize("steps", [1, 5, 11, 12, 13, 24])
def test_a_checkpoint_written_after_fit_is_as_good(tmp_path: Path, steps: int) -> None:
    whole, part, resumed = Recorder(), Recorder(), Recorder()
    trainer(max_steps=30).fit(whole, data(tmp_path))
    first = trainer(max_steps=steps)
    first.fit(part, data(tmp_path))
    first.save_checkpoint(tmp_path / "after.ckpt")
    trainer(max_steps=30).fit(resumed, data(tmp_path), ckpt_path=tmp_path / "after.ckpt")
    assert part.seen + resumed.seen == whole.seen


def test_what_lightning_saves_by_itself_is_as_good(tmp_path: Path) -> None:
    whole, resumed = Recorder(), Recorder()
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=7, save_top_k=-1)
    trainer(max_steps=30, callbacks=[saving]).fit(whole, data(tmp_path))
    trainer(max_steps=30).fit(resumed, data(tmp_path), ckpt_path=tmp_path / "saved" / "step=14.ckpt")
    assert resumed.seen == whole.seen[14:]


class Fails(Recorder):
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if len(self.seen) == 9:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_that_failed_is_read_again(tmp_path: Path, num_workers: int) -> None:
    """It was read, and with workers more ahead of it, but not trained on."""
    whole, failed, resumed = Recorder(), Fails(), Recorder()
    trainer(max_steps=20).fit(whole, data(tmp_path))
    saving = ModelCheckpoint(tmp_path / "saved", save_on_exception=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(max_steps=20, callbacks=[saving]).fit(failed, data(tmp_path, num_workers=num_workers))
    (saved,) = (tmp_path / "saved").iterdir()
    trainer(max_steps=20).fit(resumed, data(tmp_path), ckpt_path=saved)
    assert failed.seen == whole.seen[:9]
    assert resumed.seen == whole.seen[9:]


def test_another_batch_size_goes_on_with_the_next_sample(tmp_path: Path) -> None:
    whole, part, resumed = Recorder(), Recorder(), Recorder()
    trainer(max_steps=30).fit(whole, data(tmp_path))
    first = trainer(max_steps=10)
    first.fit(part, data(tmp_path, batch_size=4))
    first.save_checkpoint(tmp_path / "part.ckpt")
    trainer(max_steps=15).fit(resumed, data(tmp_path, batch_size=16), ckpt_path=tmp_path / "part.ckpt")
    samples = [sample for batch in part.seen + resumed.seen for sample in batch]
    assert samples == [sample for batch in whole.seen for sample in batch][: len(samples)]


def test_fit_goes_on_with_its_trainer_and_begins_anew_with_another(tmp_path: Path) -> None:
    whole, module, again = Recorder(), Recorder(), Recorder()
    trainer(max_steps=25).fit(whole, data(tmp_path))
    module_data = data(tmp_path)
    first = trainer(max_steps=10)
    first.fit(module, module_data)
    first.fit_loop.epoch_loop.max_steps = 25
    first.fit(module, module_data)
    assert module.seen == whole.seen
    trainer(max_steps=5).fit(again, module_data)
    assert again.seen == whole.seen[:5]
    first.save_checkpoint(tmp_path / "first.ckpt")  # of the first trainer, while the data serve another
    resumed = Recorder()
    trainer(max_steps=25).fit(resumed, data(tmp_path), ckpt_path=tmp_path / "first.ckpt")
    assert resumed.seen == []


def test_looking_at_a_checkpoint_does_not_move_the_training_data(tmp_path: Path) -> None:
    first, module_data = trainer(max_steps=7), data(tmp_path)
    whole = Recorder()
    first.fit(whole, data(tmp_path))
    first.save_checkpoint(tmp_path / "seven.ckpt")
    trainer().validate(Recorder(), module_data, ckpt_path=tmp_path / "seven.ckpt", verbose=False)
    again = Recorder()
    trainer(max_steps=7).fit(again, module_data)
    assert again.seen == whole.seen


@pytest.mark.parametrize("change", [{"seed": 1}, {"validation_fraction": 0.3}, {"shuffle": False}], ids=str)
def test_other_data_than_the_checkpoints_are_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    first = trainer(max_steps=3)
    first.fit(Recorder(), data(tmp_path))
    first.save_checkpoint(tmp_path / "three.ckpt")
    with pytest.warns(UserWarning, match="trained on other data.*goes on with sample 24 "):
        trainer(max_steps=5).fit(Recorder(), data(tmp_path, **change), ckpt_path=tmp_path / "three.ckpt")


def test_resuming_in_mid_epoch_warns_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    first = trainer(max_steps=3)
    first.fit(Recorder(), data(tmp_path))
    first.save_checkpoint(tmp_path / "three.ckpt")
    trainer(max_steps=5).fit(Recorder(), data(tmp_path, num_workers=1), ckpt_path=tmp_path / "three.ckpt")
    about_data = [str(warning.message) for warning in recwarn if "data" in str(warning.message)]
    assert about_data == []  # neither ours nor Lightning's "your dataloader is not resumable"


def test_without_a_trainer_what_was_read_counts(tmp_path: Path) -> None:
    one, other = data(tmp_path), data(tmp_path)
    loader = one.train_dataloader()
    batches = [batch["input_ids"] for batch in loader]
    for _ in zip(range(5), loader, strict=False):
        pass
    other.setup()
    other.load_state_dict(one.state_dict())
    following = next(iter(other.train_dataloader()))["input_ids"]
    assert one.state_dict()["samples"] == (len(batches) + 5) * 8
    assert torch.equal(following, next(iter(loader))["input_ids"])


# ---- data ranks -------------------------------------------------------------------------------


def fit_on_rank(rank: int, folder: Path, steps: int, checkpoint: Path | None, **options: Any) -> Recorder:
    os.environ["LOCAL_RANK"] = str(rank)  # processes are there already; Lightning starts none
    module = Recorder()
    of_all = trainer(max_steps=steps, devices=2, strategy="ddp", use_distributed_sampler=True)
    of_all.fit(module, data(folder, **options), ckpt_path=checkpoint)
    of_all.save_checkpoint(folder / "two-ranks.ckpt")
    return module


def seen_on_rank(rank: int, folder: Path, steps: int, checkpoint: Path | None) -> tuple[Any, Any]:
    module = fit_on_rank(rank, folder, steps, checkpoint, batch_size=4)
    return module.seen, module.validated


def test_two_data_ranks_and_one_read_the_same_and_take_over_from_each_other(tmp_path: Path) -> None:
    corpus(tmp_path)
    whole = Recorder()
    trainer(max_steps=30).fit(whole, data(tmp_path))

    first = trainer(max_steps=8)
    first.fit(Recorder(), data(tmp_path))
    first.save_checkpoint(tmp_path / "one-rank.ckpt")
    left, right = run_ranks(2, seen_on_rank, tmp_path, 19, tmp_path / "one-rank.ckpt")
    assert [one + other for one, other in zip(left[0], right[0], strict=True)] == whole.seen[8:19]

    last = Recorder()
    trainer(max_steps=30).fit(last, data(tmp_path), ckpt_path=tmp_path / "two-ranks.ckpt")
    assert last.seen == whole.seen[19:]

    assert [one + other for one, other in zip(left[1], right[1], strict=True)] == whole.validated


def test_a_data_module_is_sent_to_other_processes_before_and_after_setup(tmp_path: Path) -> None:
    import pickle

    module_data = data(tmp_path)
    early: TextDataModule = pickle.loads(pickle.dumps(module_data))
    module_data.setup()
    late: TextDataModule = pickle.loads(pickle.dumps(module_data))
    batches = [next(iter(copy.train_dataloader()))["input_ids"] for copy in (module_data, early, late)]
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])
