"""The whole model, under a Trainer, with the fake of Transformer Engine: the same losses as with the definition."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.precision.convert import convert
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.recipe import Block
from lightning_dualpipe.precision.te_backend import TEBackend
from tests.precision.fake_te import fake_te
from tests.ranks import run_ranks
from tests.strategy import runs
from tests.strategy.runs import SHAPE, Run, write_corpus

SIZES = {
    **SHAPE,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
RUNS = {
    "auto": Run(accumulate=2),
    "dualpipe": Run({"schedule": "dualpipe", "pipeline_parallel_size": 2, "num_microbatches": 4}, world=2),
}


def wanted(name: str, layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features % 16 == layer.out_features % 16 == 0
    return isinstance(layer, Experts)


def train(rank: int, run: Run) -> dict[str, tuple[list[float], int]]:
    """By backend, losses, and how many layers are converted."""
    return {backend: train_with(backend, rank, run) for backend in ("te", "emulate")}


def train_with(backend: str, rank: int, run: Run) -> tuple[list[float], int]:
    converted: list[str] = []

    class Converted(DeepSeekV3):
        def configure_model(self) -> None:
            super().configure_model()
            if not converted:
                kind = {"te": TEBackend, "emulate": EmulateBackend}[backend]
                converted.extend(convert(self, kind(Block()), wanted))

    build = partial(Converted, "tiny", dict(run.overrides), learning_rate=1e-2, warmup_steps=5, recompute="full")
    with fake_te(), mock.patch.object(runs, "build_module", lambda run: build()):
        return runs.train(rank, run).losses, len(converted)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    """1e-4: experts have any number of rows, and padding them may change the order of additions."""
    common = {"precision": "32-true", "steps": 3, "global_batch": 4}
    run = replace(RUNS[name], corpus=write_corpus(tmp_path), overrides=SIZES, **common)
    results = train(0, run) if run.world == 1 else run_ranks(run.world, train, run)[0]
    (losses, converted), (expected, as_many) = results["te"], results["emulate"]
    assert converted == as_many == 17  # 5 + 3, then 5 + 3 + the stack of experts
    assert losses[-1] != losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
