"""Training with expert tokens in FP8: how they travel changes no bit, and where experts live changes no result."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.deepseek_v3.recompute import Recompute
from lightning_dualpipe.parallel.dispatch import TokenDispatcher
from lightning_dualpipe.precision.fp8_rows import FP8Rows, round_expert_tokens
from lightning_dualpipe.precision.recipe import Block
from tests.ranks import run_ranks
from tests.strategy import runs
from tests.strategy.runs import SHAPE, Result, Run, gathered, same_everywhere, train, write_corpus

PP1: dict[str, Any] = {"pipeline_parallel_size": 1, "expert_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2, "expert_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp1 ep2, by node": (2, PP1 | {"dispatcher": "node"}),
    "pp1 ep2, one row per expert": (2, PP1 | {"dispatcher": "all_to_all"}),
    "pp2 ep2, by node": (4, PP2 | {"dispatcher": "node"}),
    "pp2 ep2, one row per expert": (4, PP2 | {"dispatcher": "all_to_all"}),
    "pp2 ep2, without overlap": (4, PP2 | {"dispatcher": "node", "overlap": False}),
}
STEPS = 5


class Rounding(DeepSeekV3):
    def configure_model(self) -> None:
        super().configure_model()
        assert round_expert_tokens(self.model, Block())


def rounding_module(run: Run, recompute: Recompute = "none") -> Rounding:
    overrides = {**SHAPE, **run.overrides}
    return Rounding("tiny", overrides, learning_rate=1e-2, warmup_steps=5, recompute=recompute)  # type: ignore[arg-type]


class Encoded:
    """Counts rows, and lets them travel as they are if asked to."""

    def __init__(self, patch: pytest.MonkeyPatch, *, in_fp8: bool) -> None:
        self.rows = 0
        encode = FP8Rows.encode

        def counting(row_format: FP8Rows, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.rows += len(x_RD)
            return encode(row_format, x_RD)

        patch.setattr(FP8Rows, "encode", counting)
        if not in_fp8:
            patch.setattr(TokenDispatcher, "row_format", property(lambda _: None, lambda *_: None))


def _both_ways(rank: int, run: Run) -> list[tuple[Result, int]]:
    results = []
    for in_fp8 in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "build_module", rounding_module)
            encoded = Encoded(patch, in_fp8=in_fp8)
            results.append((train(rank, run), encoded.rows))
    return results


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("fp8_tokens"))


@pytest.fixture(scope="module")
def alone(corpus: str) -> dict[str, Result]:
    """Of one process, with rounding and without."""
    run = Run(corpus=corpus, steps=STEPS)
    with pytest.MonkeyPatch.context() as patch:
        plain = train(0, run)
        patch.setattr(runs, "build_module", rounding_module)
        return {"plain": plain, "rounded": train(0, run)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_tokens_travel_changes_no_bit_and_where_experts_live_changes_no_result(
    layout: str, corpus: str, alone: dict[str, Result]
) -> None:
    world, strategy = LAYOUTS[layout]
    run = Run(strategy=strategy, world=world, corpus=corpus, steps=STEPS)
    in_fp8, as_they_are = zip(*run_ranks(world, _both_ways, run, timeout=400), strict=True)
    assert all(rows for _, rows in in_fp8) and not any(rows for _, rows in as_they_are)
    assert [result for result, _ in in_fp8] == [result for result, _ in as_they_are]

    results = [result for result, _ in in_fp8]
    want = alone["rounded"]
    losses = torch.tensor(want.losses, dtype=torch.float64)
    torch.testing.assert_close(same_everywhere(results), losses, rtol=0, atol=1e-9)
    torch.testing.assert_close(results[0].norms, want.norms, rtol=1e-9, atol=1e-9)
    assert gathered(results, "counts") == want.counts and gathered(results, "biases") == want.biases


def test_rounding_is_seen_in_the_losses_and_does_not_harm(alone: dict[str, Result]) -> None:
    plain, rounded = (torch.tensor(alone[which].losses, dtype=torch.float64) for which in ("plain", "rounded"))
    assert (plain - rounded).abs().max() > 1e-6
    assert ((plain - rounded).abs() / plain).mean() < 0.0025, "technical report, section 3.3"


def _keeping_fp8(rank: int, run: Run) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "build_module", partial(rounding_module, recompute="selective_fp8"))
        return train(rank, run)


@pytest.mark.parametrize("layout", ["pp2 ep2, by node", "pp1 ep2, one row per expert"])
def test_values_that_are_kept_in_fp8_give_the_losses_of_one_process(
    layout: str, corpus: str, alone: dict[str, Result]
) -> None:
    world, strategy = LAYOUTS[layout]
    run = Run(corpus=corpus, steps=STEPS)
    want = _keeping_fp8(0, run)
    results = run_ranks(world, _keeping_fp8, replace(run, strategy=strategy, world=world), timeout=400)
    losses = torch.tensor(want.losses, dtype=torch.float64)
    torch.testing.assert_close(same_everywhere(results), losses, rtol=0, atol=1e-9)
    torch.testing.assert_close(results[0].norms, want.norms, rtol=1e-9, atol=1e-9)
    assert want.losses[0] == alone["rounded"].losses[0] and want.norms != alone["rounded"].norms


def test_no_bit_changes_in_bf16_either(corpus: str) -> None:
    run = Run(strategy=LAYOUTS["pp1 ep2, by node"][1], world=2, corpus=corpus, steps=3, precision="bf16-true")
    in_fp8, as_they_are = zip(*run_ranks(2, _both_ways, replace(run, clip=None), timeout=400), strict=True)
    assert [result for result, _ in in_fp8] == [result for result, _ in as_they_are]
