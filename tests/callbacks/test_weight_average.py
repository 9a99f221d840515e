"""The average of a model that is spread over ranks is the one Lightning's callback keeps of the whole model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_dualpipe.callbacks import WeightAverage
from lightning_dualpipe.checkpoint.stored import read_whole
from tests.ranks import run_ranks
from tests.strategy.runs import Run, build, write_corpus

DECAY, SAVED_AT, STEPS = 0.8, 3, 6
AVERAGES = {"Lightning's": EMAWeightAveraging, "ours": WeightAverage}


class Losses(L.Callback):
    """Validation losses, which are the average's."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


def average(
    rank: int, run: Run, whose: str, folder: str, resumed: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Validation losses, and the weights at the end of fit, of which each rank has some."""
    path = f"{folder}/step={SAVED_AT}.ckpt"
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    losses = Losses()
    run = replace(run, trainer={**run.trainer, "enable_checkpointing": not resumed})
    callbacks = [AVERAGES[whose](decay=DECAY), losses, *([] if resumed else [checkpoint])]
    trainer, module, data = build(rank, run, callbacks=callbacks)
    trainer.fit(module, data, ckpt_path=path if resumed else None)
    return losses.losses, {name: tensor.cpu() for name, tensor in module.state_dict().items()}


class Case(NamedTuple):
    precision: str
    model: str
    strategy: Mapping[str, Any]
    oracle: str  # whose average of the whole model is the right one
    tolerance: float


PP2 = {"pipeline_parallel_size": 2, "schedule": "dualpipev"}
CASES = {
    # Lightning copies the module before its precision is set: its average is float32
    "dualpipev pp2": Case("64-true", "gpt", PP2, "Lightning's", 1e-6),
    "dualpipev pp2 in bfloat16": Case("bf16-true", "gpt", PP2, "Lightning's", 0.1),
    "a directory": Case("bf16-true", "gpt", {**PP2, "save_distributed_checkpoint": True}, "Lightning's", 0.1),
    # the average of experts is where they are
    "pp1 ep2": Case("64-true", "deepseek_v3", {"pipeline_parallel_size": 1, "expert_parallel_size": 2}, "ours", 1e-9),
}


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_the_one_that_is_kept_of_the_whole_model(tmp_path: Path, case: str) -> None:
    precision, model, strategy, oracle, within = CASES[case]
    every = {"val_check_interval": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    run = Run(corpus=write_corpus(tmp_path), steps=STEPS, precision=precision, model=model, trainer=every)
    tolerance = {"rtol": within, "atol": within}
    expected_losses, expected = average(0, run, oracle, str(tmp_path / "alone"))
    spread = replace(run, strategy=strategy, world=2)

    together = run_ranks(2, average, spread, "ours", str(tmp_path / "together"), timeout=200)

    for rank, (losses, weights) in enumerate(together):
        assert losses == pytest.approx(expected_losses, abs=within)
        for name, values in weights.items():
            whole = expected[name]
            mine = whole if whole.shape == values.shape else whole.chunk(len(whole) // len(values))[rank]
            torch.testing.assert_close(values, mine, **tolerance, msg=name)
    saved, theirs = (tmp_path / who / f"step={SAVED_AT}.ckpt" for who in ("together", "alone"))
    saved, theirs = read_whole(saved) if saved.is_dir() else torch.load(saved), torch.load(theirs)
    for key in ("state_dict", "current_model_state"):
        assert list(saved[key]) == list(theirs[key])
        for name, values in saved[key].items():
            torch.testing.assert_close(values.to(theirs[key][name].dtype), theirs[key][name], **tolerance, msg=name)

    resumed = run_ranks(2, average, spread, "ours", str(tmp_path / "together"), True, timeout=200)
    for (losses, weights), (uninterrupted, same) in zip(resumed, together, strict=True):
        assert losses == uninterrupted[SAVED_AT:]
        assert all(torch.equal(weights[name], same[name]) for name in same)
