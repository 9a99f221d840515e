"""With FP8 too, the layout is none of the loss's business, as long as the same tokens share a scale.

Tokens share a scale in the weight gradients, whose tiles lie along the tokens of a microbatch (of its part at an
expert). So runs of the same microbatches are compared with each other: one process that takes one after the other
is the oracle. Where data or expert size regroups tokens, losses differ; by how much is checked as well.

Scales are float32: with powers of two a number is rounded the same way under any scale, but for the smallest ones,
and regrouped tokens could not be told from others.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.strategy.runs import SHAPE, Result, Run, gathered, same_everywhere, train, train_everywhere, write_corpus

FP8 = {"recipe": {"name": "block", "scales": "float32"}, "backend": "emulate"}
SIZES = {**SHAPE, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
STEPS, MICROBATCHES = 3, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("fp8"))


def fp8_run(corpus: str, world: int, **strategy: Any) -> Run:
    options = {"num_microbatches": MICROBATCHES, **strategy}
    return Run(strategy=options, world=world, corpus=corpus, steps=STEPS, overrides=SIZES, fp8=FP8)


@pytest.fixture(scope="module")
def alone(corpus: str) -> Result:
    """One process, one microbatch after the other, weight gradients at once."""
    return train(0, fp8_run(corpus, 1, pipeline_parallel_size=1, schedule="gpipe", overlap=False))


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dualpipe pp1": (1, {"schedule": "dualpipe", "pipeline_parallel_size": 1}),
    "dualpipe pp2": (2, {"schedule": "dualpipe", "pipeline_parallel_size": 2}),
    "dualpipe pp2, no overlap": (2, {"schedule": "dualpipe", "pipeline_parallel_size": 2, "overlap": False}),
    "dualpipev pp2": (2, {"schedule": "dualpipev", "pipeline_parallel_size": 2}),
    "zb1p pp2": (2, {"schedule": "zb1p", "pipeline_parallel_size": 2}),
    "dualpipe pp4": (4, {"schedule": "dualpipe", "pipeline_parallel_size": 4}),
    "1f1b pp4": (4, {"schedule": "1f1b", "pipeline_parallel_size": 4}),
    "gpipe pp2": (2, {"schedule": "gpipe", "pipeline_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_routing_are_those_of_one_process(layout: str, corpus: str, alone: Result) -> None:
    world, strategy = LAYOUTS[layout]
    check_equal(train_everywhere(fp8_run(corpus, world, **strategy)), alone)


def check_equal(results: list[Result], alone: Result) -> None:
    expected = torch.tensor(alone.losses, dtype=torch.float64)
    assert expected[-1] < expected[0] - 0.5, "the run must learn something, or equality says little"
    assert (same_everywhere(results) - expected).abs().max() <= 1e-9
    norms = (torch.tensor(each, dtype=torch.float64) for each in (results[0].norms, alone.norms))
    torch.testing.assert_close(*norms, rtol=1e-9, atol=1e-9)
    assert gathered(results, "counts") == alone.counts and gathered(results, "biases") == alone.biases


def test_other_microbatches_and_no_fp8_can_be_told_apart_at_that_tolerance(corpus: str, alone: Result) -> None:
    """Or the test above would compare runs that FP8 never reached."""
    for other in (
        fp8_run(corpus, 1, pipeline_parallel_size=1, num_microbatches=2),
        Run(strategy={"pipeline_parallel_size": 1}, corpus=corpus, steps=STEPS, overrides=SIZES),
    ):
        losses = torch.tensor([train(0, other).losses, alone.losses], dtype=torch.float64)
        assert 1e-6 < (losses[0] - losses[1]).abs().max() < 0.1


SMALL = {**SIZES, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}


def regrouped(corpus: str, world: int, strategy: dict[str, Any]) -> Run:
    """The default recipe. A rate of 1e-2, from scratch, would amplify any difference at all to half a percent."""
    options, fp8 = {"num_microbatches": 1, **strategy}, {"backend": "emulate"}
    run = Run(strategy=options, world=world, corpus=corpus, steps=50, overrides=SMALL, fp8=fp8)
    return replace(run, learning_rate=3e-3)


def test_where_other_tokens_share_a_scale_losses_differ_by_a_thousandth_at_most(corpus: str) -> None:
    """Mean relative difference over 50 steps: data ranks share out the tokens, and experts get those of both."""
    alone = train(0, regrouped(corpus, 1, {"pipeline_parallel_size": 1}))
    results = train_everywhere(regrouped(corpus, 2, {"pipeline_parallel_size": 1, "expert_parallel_size": 2}))
    losses, expected = same_everywhere(results), torch.tensor(alone.losses, dtype=torch.float64)
    assert expected[-1] < expected[0] - 2
    assert ((losses - expected).abs() / expected).mean() <= 1e-3
