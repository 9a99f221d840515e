"""A step that is left out leaves no trace: the run is, bit for bit, one whose data lack its batches."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_dualpipe import ConfigurationError, DeepSeekV3, TrainingError
from lightning_dualpipe.callbacks import LossSpikeGuard, NonFiniteGuard, WeightAverage
from lightning_dualpipe.callbacks.loss_spike_guard import spike_limit
from tests.ranks import Cases
from tests.strategy.runs import Recorder, Run, build, write_corpus

STEPS, BATCH = 4, 2
WEIGHT = "model.blocks.1.self_attn.o_proj.weight"


@dataclass(frozen=True)
class Case:
    run: Run
    trouble: str = "gradient"
    spikes: Mapping[str, Any] | None = None  # arguments of LossSpikeGuard, which takes NonFiniteGuard's place


@dataclass
class Outcome:
    state: dict[str, Any]  # weights, biases, optimizer, schedule, counts
    losses: list[float]
    said: str
    logged: float | None


class Trouble(L.Callback):
    """Comes with some batches. That of a gradient on one rank that holds it, that of a loss in one sequence."""

    def __init__(self, kind: str, batches: Sequence[int] = (BATCH,)) -> None:
        self.kind, self.batches = kind, batches

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        usual = type(module.model).loss  # type: ignore[arg-type]
        factor = {"loss": math.nan, "spike": 50.0}.get(self.kind, 1.0) if batch_idx in self.batches else 1.0
        row = batch["input_ids"][-1]

        def loss(values: Any, batch: Any) -> Mapping[str, Tensor]:
            sums = usual(module.model, values, batch)
            hit = bool((batch["input_ids"] == row).all(-1).any())
            return {**sums, "loss": sums["loss"] * (factor if hit else 1.0)}

        vars(module.model)["loss"] = loss
        if self.kind == "weight" and batch_idx in self.batches:
            self._spoil(trainer, module, lambda parameter: parameter.detach())

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.kind == "gradient" and trainer.fit_loop.epoch_loop.batch_idx in self.batches:
            self._spoil(trainer, module, lambda parameter: parameter.grad)

    def _spoil(self, trainer: L.Trainer, module: L.LightningModule, part: Callable[[Any], Tensor]) -> None:
        named = dict(module.named_parameters())
        name = WEIGHT if isinstance(module, DeepSeekV3) else list(named)[-1]
        if name in named and trainer.global_rank == (trainer.world_size > 1):
            part(named[name]).view(-1)[1] = math.inf


class Without:
    """A loader that lacks a batch."""

    def __init__(self, loader: Any, batch: int) -> None:
        self.loader, self.batch = loader, batch

    def __len__(self) -> int:
        return len(self.loader) - 1

    def __iter__(self) -> Iterator[Any]:
        yield from (batch for index, batch in enumerate(self.loader) if index != self.batch)


def without_batch(dataloader: Callable[[], Any], batch: int = BATCH) -> Callable[[], Any]:
    return lambda: Without(dataloader(), batch)


def fit(rank: int, case: Case, without: bool) -> Outcome:
    guard = NonFiniteGuard() if case.spikes is None else LossSpikeGuard(**case.spikes)
    trouble = Trouble("none" if without else case.trouble)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module, data = build(rank, case.run, callbacks=[trouble, guard])
        if without:
            data.train_dataloader = without_batch(data.train_dataloader)  # type: ignore[method-assign]
        trainer.fit(module, data)
    recorder = next(each for each in trainer.callbacks if isinstance(each, Recorder))
    said = "\n".join(str(each.message) for each in caught if "Guard" in str(each.message))
    logged = trainer.callback_metrics.get(guard.metric)
    return Outcome(_state(trainer, module), recorder.losses, said, None if logged is None else float(logged))


def _state(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    assert isinstance(module, DeepSeekV3)
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    return {
        **module.state_dict(),
        **{f"load {name}": load for name, load in module.expert_load.items()},
        "optimizer": [dict(state) for state in optimizer.state.values()],
        "rates": [group["lr"] for group in optimizer.param_groups],
        "schedule": {k: v for k, v in config.scheduler.state_dict().items() if k != "lr_lambdas"},
        "tokens": module.tokens_seen,
        "steps": trainer.global_step,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


SPIKES = {"window": 4, "threshold": 5.0, "min_rise": 1.0}
PP2 = {"pipeline_parallel_size": 2, "num_microbatches": 4}
EP2 = {"pipeline_parallel_size": 1, "expert_parallel_size": 2}


def compared(rank: int, case: Case) -> tuple[Outcome, Outcome]:
    return fit(rank, case, without=False), fit(rank, case, without=True)


@lru_cache
def outcomes() -> Mapping[str, list[tuple[Outcome, Outcome]]]:
    """Of every rank: with the trouble, and without the batch."""
    with TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder))

        def case(*arguments: Any, world: int = 1, **options: Any) -> Case:
            shallow = {"num_hidden_layers": 3}  # a dense one, two with experts, and multi-token prediction's
            return Case(Run(steps=STEPS, corpus=corpus, world=world, overrides=shallow, **options), *arguments)

        found = {"auto": [compared(0, case())]}
        two = {
            "ddp loss": case("loss", world=2, strategy="ddp", clip=None),
            "dualpipe bf16": case(world=2, strategy=PP2, precision="bf16-true"),
            "dualpipe loss": case("loss", world=2, strategy=PP2),
            "experts spread": case(world=2, strategy=EP2),
        }
        results = Cases(2, compared, {name: (each,) for name, each in two.items()}, timeout=200)
        return found | {name: results[name] for name in two}


SAID = {
    "auto": f"the gradient of {WEIGHT} is not finite",
    "ddp loss": "the loss is not finite: batch 2 on rank 0 nan, batch 2 on rank 1 nan; the gradient of model.lm_head",
    "dualpipe bf16": f"the gradient of {WEIGHT} (stage 0, rank 1) is not finite",
    "dualpipe loss": "the loss is not finite: batch 2 nan (microbatch 3 on rank 0 nan); the gradient of "
    "model.lm_head.weight (stage 1, ranks 0, 1) is not finite, and ",
    "experts spread": f"the gradient of {WEIGHT} (stage 0, rank 1) is not finite",
}


@pytest.mark.parametrize("name", SAID)
def test_a_skipped_step_leaves_no_trace_and_is_told_once(name: str) -> None:
    for guarded, without in outcomes()[name]:
        different = [key for key in guarded.state if not same(guarded.state[key], without.state[key])]
        assert different == []
        assert guarded.state["steps"] == STEPS
        assert guarded.losses[:BATCH] + guarded.losses[BATCH + 1 :] == without.losses
        assert all(math.isfinite(loss) for loss in without.losses)
        assert (guarded.logged, without.logged) == (1.0, 0.0)
    first, *others = outcomes()[name]
    assert f": optimizer step {BATCH + 1}: {SAID[name]}" in first[0].said
    assert first[0].said.endswith("It is skipped; 1 so far")
    assert [other.said for other, _ in others] == [""] * len(others)


def test_every_layout_goes_on_as_one_process_does() -> None:
    ((_, expected),) = outcomes()["auto"]
    for guarded, _ in outcomes()["experts spread"]:
        assert guarded.losses[BATCH + 1 :] == pytest.approx(expected.losses[BATCH:], rel=1e-9)


# ---- one process, a small model -------------------------------------------------------------------


def small(folder: Path, *callbacks: L.Callback, steps: int = STEPS, accumulate: int = 1) -> tuple[Any, ...]:
    corpus = str(folder / "corpus.txt") if (folder / "corpus.txt").exists() else write_corpus(folder)
    run = Run(model="your own", steps=steps, corpus=corpus, precision="32-true", accumulate=accumulate)
    return build(0, run, callbacks=callbacks)


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_stop_raises_before_the_step(tmp_path: Path) -> None:
    trainer, module, data = small(tmp_path, steps=BATCH)
    trainer.fit(module, data)
    before = weights(module)
    trainer, module, data = small(tmp_path, Trouble("gradient"), NonFiniteGuard("stop"))
    with pytest.raises(TrainingError, match=r"optimizer step 3: the gradient of .* is not finite.*in the weights"):
        trainer.fit(module, data)
    assert same(weights(module), before)


def test_patience_is_for_steps_in_a_row(tmp_path: Path) -> None:
    guard = NonFiniteGuard(patience=2)
    trainer, module, data = small(tmp_path, Trouble("gradient", (1, 2, 4, 5)), guard, steps=4)
    trainer.fit(module, data)
    assert (guard.skipped, trainer.global_step) == (4, 4)
    trainer, module, data = small(tmp_path, Trouble("gradient", (1, 2, 3)), NonFiniteGuard(patience=2))
    with pytest.raises(TrainingError, match=r"optimizer step 2: .*2 steps in a row were skipped before it"):
        trainer.fit(module, data)


def test_weights_that_are_not_finite_end_the_run_whatever_the_action(tmp_path: Path) -> None:
    trainer, module, data = small(tmp_path, Trouble("weight"), NonFiniteGuard("skip"))
    with pytest.raises(TrainingError, match="not finite themselves, which no skipped step mends: "):
        trainer.fit(module, data)


def test_a_batch_of_an_accumulated_step_takes_the_others_with_it(tmp_path: Path) -> None:
    guard, recorder = NonFiniteGuard(), Recorder()
    trainer, module, data = small(tmp_path, Trouble("loss", (2,)), guard, recorder, steps=3, accumulate=2)
    trainer.fit(module, data)
    assert (guard.skipped, trainer.global_step, len(recorder.losses)) == (1, 3, 8)
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())


class Scales(L.Callback):
    """In a way that torch's count of writes to a tensor does not see."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.data.mul_(1000.0)


def test_clipping_sees_what_was_written_to_gradients_after_the_guard_had_looked(tmp_path: Path) -> None:
    found = []

    def clip(optimizer: Any, **how: Any) -> None:
        module.clip_gradients(optimizer, **how)
        found.append(float(trainer.strategy.gradient_norm()))

    run = Run(
        {"pipeline_parallel_size": 1}, model="your own", steps=2, precision="32-true", corpus=write_corpus(tmp_path)
    )
    trainer, module, data = build(0, run, callbacks=[NonFiniteGuard(), Scales()])
    module.configure_gradient_clipping = clip  # type: ignore[method-assign]
    trainer.fit(module, data)
    assert found == pytest.approx([1.0, 1.0], rel=1e-5)


def test_two_guards_skip_a_step_once(tmp_path: Path) -> None:
    guards = NonFiniteGuard(), LossSpikeGuard(**SPIKES)
    trainer, module, data = small(tmp_path, Trouble("loss", (5,)), *guards, steps=8)
    trainer.fit(module, data)
    assert [guard.skipped for guard in guards] == [1, 0]
    assert trainer.global_step == 8


def test_a_spike_is_left_out_before_the_step(tmp_path: Path) -> None:
    guard = LossSpikeGuard(**SPIKES)
    trainer, module, data = small(tmp_path, Trouble("spike", (6,)), guard, steps=7)
    trainer.fit(module, data)
    plain, other, same_data = small(tmp_path, steps=7)
    same_data.train_dataloader = without_batch(same_data.train_dataloader, 6)
    plain.fit(other, same_data)
    assert (guard.skipped, trainer.global_step) == (1, 7)
    assert same(weights(module), weights(other))


def test_a_skipped_step_is_no_update_of_the_average(tmp_path: Path) -> None:
    averaged = []
    for without in (False, True):
        trainer, module, data = small(
            tmp_path, WeightAverage(decay=0.5), Trouble("none" if without else "gradient"), NonFiniteGuard()
        )
        if without:
            data.train_dataloader = without_batch(data.train_dataloader)
        trainer.fit(module, data)  # leaves the average in the module
        averaged.append(weights(module))
    assert same(*averaged)


def test_manual_optimization_skips_too(tmp_path: Path) -> None:
    trainer, module, data = small(tmp_path, Trouble("gradient"), NonFiniteGuard())
    plain, other, same_data = small(tmp_path, steps=STEPS)
    same_data.train_dataloader = without_batch(same_data.train_dataloader)
    for each in (module, other):
        step_by_hand(each)
    trainer.gradient_clip_val = plain.gradient_clip_val = None
    trainer.fit(module, data)
    plain.fit(other, same_data)
    assert trainer.global_step == plain.global_step == STEPS
    assert same(weights(module), weights(other))


def step_by_hand(module: L.LightningModule) -> None:
    usual = module.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(usual(batch, batch_idx))
        optimizer.step()

    module.automatic_optimization = False
    module.training_step = training_step  # type: ignore[method-assign]


def test_a_resumed_run_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    guard = LossSpikeGuard(**SPIKES)
    trainer, module, data = small(tmp_path, Trouble("spike", (2, 5, 7)), guard, steps=7)
    trainer.fit(module, data)
    assert guard.skipped == 2  # at the first of them there were too few to compare with

    first = LossSpikeGuard(**SPIKES)
    trainer, module, data = small(tmp_path, Trouble("spike", (2, 5, 7)), first, steps=5)
    trainer.fit(module, data)
    trainer.save_checkpoint("half.ckpt")
    second = LossSpikeGuard(**SPIKES)
    trainer, module, data = small(tmp_path, Trouble("spike", (2, 5, 7)), second, steps=7)
    trainer.fit(module, data, ckpt_path="half.ckpt")
    assert second.state_dict() == guard.state_dict()


def test_the_limit_follows_neither_an_outlier_nor_calm() -> None:
    noisy = [2.0, 2.1, 1.9, 2.2, 1.8, 2.05, 1.95]
    calm = spike_limit(noisy, threshold=5, min_rise=0.0)
    assert calm == pytest.approx(2.0 + 5 * 1.4826 * 0.1)
    assert spike_limit([*noisy[:-1], 1e9], threshold=5, min_rise=0.0) < 4  # a standard deviation would be 4e8
    assert spike_limit([2.0] * 7, threshold=5, min_rise=0.25) == 2.25


@pytest.mark.parametrize(
    ("build_guard", "words"),
    [
        (lambda: NonFiniteGuard("ignore"), "action='ignore' is not one of skip, stop"),  # type: ignore[arg-type]
        (lambda: NonFiniteGuard(patience=0), "patience=0 must be a positive whole number"),
        (lambda: LossSpikeGuard(threshold=math.nan), "threshold=nan must be positive"),
        (lambda: LossSpikeGuard(min_rise=-1), "min_rise=-1 must not be negative"),
        (lambda: LossSpikeGuard(window=2), "window=2 must be a whole number of at least 4"),
    ],
)
def test_bad_arguments_are_refused(build_guard: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build_guard()


def test_a_precision_that_skips_steps_itself_is_refused(tmp_path: Path) -> None:
    trainer, module, data = small(tmp_path, NonFiniteGuard())
    trainer.precision_plugin.scaler = object()
    with pytest.raises(ConfigurationError, match="has no place beside precision="):
        trainer.fit(module, data)
