"""What a Lightning user does with a Trainer works as it does in one process."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MetricCollection, SumMetric

from examples.your_own_model import GPT
from lightning_dualpipe import Batch, DualPipeStrategy
from tests.ranks import run_ranks
from tests.strategy.runs import QUIET, pretend_torchrun

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dualpipe pp2": (2, {"pipeline_parallel_size": 2}),
    "dualpipev pp2 dp2": (4, {"schedule": "dualpipev", "pipeline_parallel_size": 2}),
}


class Sequences(Dataset[Batch]):
    """``count`` sequences; every call with the same index gives the same one."""

    def __init__(self, count: int, *, length: int = 12) -> None:
        tokens = torch.randint(16, (count, length + 1), generator=torch.Generator().manual_seed(count))
        tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn: every second token repeats the one before
        self.batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> Batch:
        return {name: value[index] for name, value in self.batch.items()}


class Stream(IterableDataset[Batch]):
    """Of unknown length, and another one in every process that reads it."""

    def __iter__(self) -> Any:
        for length in (12, 6, 12, 9):  # another shape every few steps
            yield from Sequences(8, length=length)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(vocab_size=16, width=16, depth=4, heads=2)
        self.counts = MetricCollection({"tokens": SumMetric(), "sum": SumMetric()})
        self.seen: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.model(batch)
        self.log("train_loss", out["loss"], on_step=True, on_epoch=True, prog_bar=True)
        self.seen.append(float(out["loss"]))
        return out["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        out = self.model(batch)
        self.log("val_loss", out["loss"], batch_size=int(out["tokens"]), sync_dist=True)
        self.log("val_accuracy", out["accuracy"], batch_size=int(out["tokens"]), sync_dist=True)
        self.counts["tokens"].update(batch["labels"].numel())
        self.counts["sum"].update(batch["labels"].sum())
        self.log("val_tokens", self.counts["tokens"])
        self.log("val_gathered", self.all_gather(batch["labels"].sum()).sum(), batch_size=1, reduce_fx="sum")

    def on_validation_epoch_end(self) -> None:
        self.log("val_sum", self.counts["sum"].compute())
        self.counts["sum"].reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model({"input_ids": batch["input_ids"]})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss", "strict": False}}


class ManualModel(Model):
    """Two backwards before each step, as gradient accumulation by hand does; the second loss is weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        first, second = (self.model({name: value[half::2] for name, value in batch.items()}) for half in (0, 1))
        optimizer.zero_grad()
        self.manual_backward(first["loss"])
        self.manual_backward(0.5 * second["loss"] + 0.1)
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log("train_loss", first["loss"])
        self.seen.append(float(first["loss"]))


class TwoOptimizers(Model):
    """Each step trains matrices with one optimizer and then, with another, the rest; both clip by value."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            with optimizer.toggle_model():
                optimizer.zero_grad()
                loss = self.model(batch)["loss"]
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=1e-2, gradient_clip_algorithm="value")
                optimizer.step()
            self.seen.append(float(loss))
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if parameter.ndim < 2]
        return torch.optim.Adam(matrices, lr=1e-2), torch.optim.SGD(others, lr=0.1, momentum=0.9)


class DirectModel(Model):
    """Three optimizers, one without parameters on ranks without the embedding, and ``loss.backward()`` as in DDP.

    The first and the last share a backward; the second has one of its own, when the others are frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.norms: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        first, second, third = self.optimizers()
        for optimizer in (first, second, third):
            optimizer.zero_grad()
        out, again = self.model(batch), self.model(batch)
        (out["loss"] + 0.1 * again["loss"]).backward()
        self.toggle_optimizer(second)
        self.model(batch)["loss"].backward()
        self.untoggle_optimizer(second)
        for optimizer in (first, second, third):
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
        self.seen.append(out["loss"].item())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.model.embedding, self.model.blocks, self.model.head)
        kinds = (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam)
        return [kind(part.parameters(), lr=1e-2) for kind, part in zip(kinds, parts, strict=True)]


class Note(nn.Module):
    """Says something of itself that is no tensor, as modules of Transformer Engine do."""

    def __init__(self) -> None:
        super().__init__()
        self.note: str | None = None

    def get_extra_state(self) -> dict[str, str | None]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str | None]) -> None:
        self.note = state["note"]


class UnusualModel(Model):
    """Batches of dtypes that gloo does not know, extra states, weights that differ by rank, a look at old gradients."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.cleared: list[bool] = []
        self.model.embedding.say, self.model.blocks[-1].say = Note(), Note()  # of the first and of the last stage
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += rank

    def initialize_weights(self) -> None:
        raise AssertionError("nothing is without memory")

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> Tensor:
        (part,) = batch.values()
        assert {value.dtype for value in part.values()} == {torch.int16, torch.int64, torch.complex64}
        return super().training_step({name: part[name].long() for name in ("input_ids", "labels")}, batch_idx)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.cleared.append(any(parameter.grad is not None for parameter in self.parameters()))


class UnusualSequences(Sequences):
    def __getitem__(self, index: int) -> Batch:
        sample = super().__getitem__(index)
        phase = torch.polar(torch.ones(12), sample["labels"].float()).conj()
        return {"input_ids": sample["input_ids"].short(), "labels": sample["labels"], "phase": phase}


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.indices: list[Any] = []

    def write_on_batch_end(self, *arguments: Any) -> None:
        self.indices.append(arguments[3])

    def write_on_epoch_end(self, *arguments: Any) -> None:
        self.indices.append(arguments[3])


@dataclass(frozen=True)
class Outcome:
    seen: list[float]
    metrics: Mapping[str, float]
    steps: int
    learning_rate: float
    extra: Mapping[str, Any] = field(default_factory=dict)


def trainer_for(rank: int, layout: str | None, **arguments: Any) -> tuple[L.Trainer, int]:
    """A Trainer and the batch size with which all layouts read the same global batches."""
    world, strategy = LAYOUTS[layout] if layout else (1, None)
    pretend_torchrun(rank, world)
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=DualPipeStrategy(**strategy) if strategy else "auto",
        precision="64-true",
        **{**QUIET, "limit_val_batches": 1.0, **arguments},
    )
    return trainer, 8 // trainer.strategy.distributed_sampler_kwargs["num_replicas"] if strategy else 8


def outcome(trainer: L.Trainer, module: Model, **extra: Any) -> Outcome:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0
    return Outcome(module.seen, metrics, trainer.global_step, rate, extra)


def loader(count: int, batch_size: int) -> DataLoader[Batch]:
    return DataLoader(Sequences(count), batch_size=batch_size)


def fit_with_everything(rank: int, layout: str | None, folder: str) -> Outcome:
    """Sanity check, validation with a partial batch, plateau schedule, early stop, best and last checkpoints."""
    best = ModelCheckpoint(folder, filename="best", monitor="val_loss", save_last=True)
    trainer, batch_size = trainer_for(
        rank,
        layout,
        max_epochs=6,
        num_sanity_val_steps=2,
        detect_anomaly=True,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        callbacks=[EarlyStopping("val_loss", min_delta=0.05, patience=1), best],
    )
    module = Model()
    trainer.fit(module, FixedShares(40, batch_size, trainer), FixedShares(20, batch_size, trainer))
    files = sorted(path.name for path in Path(folder).iterdir())
    return outcome(trainer, module, best=float(best.best_model_score), files=files)


class FixedShares(DataLoader[Batch]):
    """Reads this data rank's share of every global batch of 8, the last one smaller."""

    def __init__(self, count: int, batch_size: int, trainer: L.Trainer) -> None:
        rank = 0
        if isinstance(trainer.strategy, DualPipeStrategy):
            rank = trainer.strategy.distributed_sampler_kwargs["rank"]
        batches = [range(start, min(start + 8, count)) for start in range(0, count, 8)]
        sizes = [len(batch) * batch_size // 8 for batch in batches]
        shares = [batch[rank * size : (rank + 1) * size] for batch, size in zip(batches, sizes, strict=True)]
        super().__init__(Sequences(count), batch_sampler=shares)


def evaluate_and_predict(rank: int, layout: str | None, _: str) -> Outcome:
    writer = Writer()
    trainer, batch_size = trainer_for(rank, layout, max_steps=2, use_distributed_sampler=False, callbacks=[writer])
    module = Model()
    trainer.fit(module, FixedShares(16, batch_size, trainer))
    (validated,) = trainer.validate(module, FixedShares(20, batch_size, trainer), verbose=False)
    (tested,) = trainer.test(module, FixedShares(12, batch_size, trainer), verbose=False)
    predicted = trainer.predict(module, DataLoader(Sequences(5), batch_size=3))
    assert writer.indices[:2] == [[0, 1, 2], [3, 4]]
    extra = {"validated": validated, "tested": tested, "predicted": predicted, "written": writer.indices}
    return outcome(trainer, module, **extra)


def fit_by_hand(rank: int, layout: str | None, _: str) -> Outcome:
    trainer, batch_size = trainer_for(rank, layout, max_epochs=3, limit_val_batches=0, use_distributed_sampler=False)
    module = ManualModel()
    trainer.fit(module, FixedShares(40, batch_size, trainer))
    return outcome(trainer, module)


def fit_with_two_optimizers(rank: int, layout: str | None, _: str) -> Outcome:
    trainer, batch_size = trainer_for(rank, layout, max_epochs=2, limit_val_batches=0, use_distributed_sampler=False)
    module = TwoOptimizers()
    trainer.fit(module, FixedShares(40, batch_size, trainer))
    return outcome(trainer, module)


def fit_directly(rank: int, layout: str | None, _: str) -> Outcome:
    trainer, batch_size = trainer_for(rank, layout, max_epochs=2, limit_val_batches=0, use_distributed_sampler=False)
    module = DirectModel()
    trainer.fit(module, FixedShares(40, batch_size, trainer))
    return outcome(trainer, module)


def fit_the_unusual(rank: int, layout: str | None, folder: str) -> Outcome:
    """Two Trainers use one CombinedLoader; a third goes on from what the second has saved."""
    loaders = CombinedLoader({"only": DataLoader(UnusualSequences(32), batch_size=8)}, "max_size")
    trainer, _ = trainer_for(rank, layout, max_steps=3, limit_val_batches=0)
    module = UnusualModel(rank)
    trainer.fit(module, loaders)
    trainer, _ = trainer_for(rank, layout, max_steps=3, limit_val_batches=0)
    trainer.fit(module, loaders)
    notes = [each for each in module.modules() if isinstance(each, Note)]
    for note in notes:
        note.note = "said"
    trainer.save_checkpoint(f"{folder}/unusual.ckpt")
    for note in notes:
        note.note = None
    trainer, _ = trainer_for(rank, layout, max_steps=5, limit_val_batches=0)
    trainer.fit(module, loaders, ckpt_path=f"{folder}/unusual.ckpt")
    states = torch.load(f"{folder}/unusual.ckpt")["state_dict"]
    return outcome(
        trainer,
        module,
        cleared=module.cleared,
        said={note.note for note in notes},
        saved=sorted(name for name, value in states.items() if value == {"note": "said"}),
    )


def fit_a_stream(rank: int, layout: str | None, _: str) -> Outcome:
    """Batches of unknown number and changing length. One pipeline: an iterable dataset shards itself."""
    trainer, _ = trainer_for(rank, layout, max_epochs=2, limit_val_batches=0)
    module = Model()
    warned = pytest.warns(UserWarning, match=r"Stream is an IterableDataset, .*\.distributed_sampler_kwargs")
    with warned if layout and rank == 0 else nullcontext():
        trainer.fit(module, DataLoader(Stream(), batch_size=4))
    return outcome(trainer, module)


def fit_shuffled(rank: int, layout: str | None, _: str) -> Outcome:
    """A shuffling loader draws from the random state of the process that reads."""
    trainer, _ = trainer_for(rank, layout, max_epochs=2, limit_val_batches=0)
    module = Model()
    if rank:
        torch.rand(rank)  # whatever the other ranks' states are
    trainer.fit(module, DataLoader(Sequences(32), batch_size=8, shuffle=True))
    return outcome(trainer, module)


CASES = {
    "everything": fit_with_everything,
    "evaluation": evaluate_and_predict,
    "manual": fit_by_hand,
    "two optimizers": fit_with_two_optimizers,
    "direct": fit_directly,
    "unusual": fit_the_unusual,
    "stream": fit_a_stream,
    "shuffled": fit_shuffled,
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, "dualpipe pp2") for case in CASES]
    + [(case, "dualpipev pp2 dp2") for case in ("everything", "evaluation", "manual", "direct")],
)
def test_a_run_is_the_one_of_a_single_process(case: str, layout: str, tmp_path: Path) -> None:
    expected = CASES[case](0, None, str(tmp_path / "alone"))
    folder = tmp_path / "together"

    results = run_ranks(LAYOUTS[layout][0], CASES[case], layout, str(folder), timeout=120)

    for result in results:
        assert result.seen == pytest.approx(expected.seen, abs=1e-9)
        assert result.steps == expected.steps
        assert result.learning_rate == expected.learning_rate
        assert result.metrics == pytest.approx(dict(expected.metrics), abs=1e-9)
        assert_close(result.extra, expected.extra)


def assert_close(ours: Any, theirs: Any) -> None:
    if isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name])
    elif isinstance(ours, list | tuple) and ours and isinstance(ours[0], Tensor):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=1e-9)
    else:
        assert ours == theirs
