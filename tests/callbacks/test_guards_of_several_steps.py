"""Two optimizer steps in a batch: each is looked at, and leaves as little behind as one that was never made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dualpipe.callbacks import LossSpikeGuard, NonFiniteGuard, WeightAverage

BATCHES = 8


@dataclass(frozen=True)
class Case:
    optimizers: int
    backwards: int  # to the two steps of a batch
    factors: Mapping[int, float]  # of the losses of steps; the n-th batch has steps 2n and 2n + 1
    dropped: Mapping[str, set[int]]  # by metric of the guard
    guards: Mapping[str, dict[str, Any]] = field(default_factory=lambda: {"skipped_nonfinite": {}})


SPIKES = {"window": 8, "threshold": 50.0, "min_rise": 1.0}
CASES = {
    "two optimizers": Case(2, 2, {2: math.nan, 3: math.nan}, {"skipped_nonfinite": {2, 3}}),
    "two optimizers, one of them": Case(2, 2, {5: math.nan}, {"skipped_nonfinite": {5}}),
    "one optimizer twice": Case(1, 2, {2: math.nan, 3: math.inf}, {"skipped_nonfinite": {2, 3}}),
    "one loss for two optimizers": Case(2, 1, {4: math.nan}, {"skipped_nonfinite": {4, 5}}),
    "a spike for two optimizers": Case(
        2, 1, {12: 1e4}, {"skipped_spikes": {12, 13}}, guards={"skipped_spikes": SPIKES}
    ),
    "after a step that another guard has dropped": Case(
        2,
        2,
        {12: math.nan, 13: 1e4, 14: math.nan},
        {"skipped_nonfinite": {12, 14}, "skipped_spikes": {13}},
        guards={"skipped_nonfinite": {}, "skipped_spikes": SPIKES},
    ),
    "before a step that another guard drops": Case(
        2,
        2,
        {12: 1e4, 13: math.nan},
        {"skipped_nonfinite": {13}, "skipped_spikes": {12}},
        guards={"skipped_nonfinite": {}, "skipped_spikes": SPIKES},
    ),
}
GUARDS = {guard.metric: guard for guard in (NonFiniteGuard, LossSpikeGuard)}


class TwoSteps(L.LightningModule):
    def __init__(self, case: Case, without: set[int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.case, self.without = case, without
        self.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def training_step(self, batch_B2: Tensor, batch_idx: int) -> None:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found, found]
        for optimizer in optimizers:
            optimizer.zero_grad()
        steps = (2 * batch_idx, 2 * batch_idx + 1)
        losses = [
            part(batch_B2).square().mean() * self.case.factors.get(step, 1.0)
            for step, part in zip(steps, self.parts, strict=True)
        ]
        if self.case.backwards == 1:
            self.manual_backward(losses[0] + losses[1])
        for step, optimizer, loss in zip(steps, optimizers, losses, strict=True):
            if self.case.backwards == 2:
                optimizer.zero_grad()
                self.manual_backward(loss)
            if step not in self.without:
                optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = list(self.parts) if self.case.optimizers == 2 else [self.parts]
        return [torch.optim.AdamW(part.parameters(), 1e-2) for part in parts]


def fit(case: Case, without: set[int]) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """The average of the weights that stays at the end, skipped steps, and those that count."""
    L.seed_everything(7, verbose=False)
    module, guards = TwoSteps(case, without), {} if without else case.guards
    built = {metric: GUARDS[metric](**options) for metric, options in guards.items()}
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WeightAverage(decay=0.5), *built.values()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(2 * BATCHES, 2), batch_size=2))
    skipped = {metric: guard.skipped for metric, guard in built.items()}
    return module.state_dict(), skipped, trainer.global_step


@pytest.mark.parametrize("name", CASES)
def test_of_several_steps_in_a_batch_the_bad_ones_leave_no_trace(name: str) -> None:
    case = CASES[name]
    dropped = set().union(*case.dropped.values())
    weights, skipped, steps = fit(case, without=set())
    expected, _, made = fit(case, without=dropped)
    assert skipped == {metric: len(those) for metric, those in case.dropped.items()}
    assert steps == made == 2 * BATCHES - len(dropped)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
