"""The same module on the same text gives the same losses, norms, router biases and token counts under every layout.

``Trainer(strategy="auto")`` in one process is the oracle. Losses are sums over tokens divided by the
number of tokens of the global batch, so layouts differ in the order of additions only: 1e-9 in
float64 leaves six orders of magnitude for 30 steps of AdamW to amplify that.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.strategy.runs import Result, Run, gathered, same_everywhere, train, train_everywhere, write_corpus

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> number of processes, DualPipeStrategy's arguments
    "dualpipe pp2": (2, {"schedule": "dualpipe", "pipeline_parallel_size": 2}),
    "dualpipe pp4": (4, {"schedule": "dualpipe", "pipeline_parallel_size": 4}),
    "dualpipev pp2": (2, {"schedule": "dualpipev", "pipeline_parallel_size": 2}),
    "dualpipev pp4": (4, {"schedule": "dualpipev", "pipeline_parallel_size": 4}),
    "zb1p pp4": (4, {"schedule": "zb1p", "pipeline_parallel_size": 4}),
    "1f1b pp4": (4, {"schedule": "1f1b", "pipeline_parallel_size": 4}),
    "gpipe pp4": (4, {"schedule": "gpipe", "pipeline_parallel_size": 4}),
    "dualpipe pp2 dp2": (4, {"schedule": "dualpipe", "pipeline_parallel_size": 2}),
    "dualpipe pp2 ep2": (4, {"schedule": "dualpipe", "pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "pp1 ep2": (2, {"pipeline_parallel_size": 1, "expert_parallel_size": 2}),
    "pp1 ep4": (4, {"pipeline_parallel_size": 1, "expert_parallel_size": 4}),
    "pp1 ep4 on two nodes": (4, {"pipeline_parallel_size": 1, "expert_parallel_size": 4}),
    "pp1 ep4, one row per expert": (
        4,
        {"pipeline_parallel_size": 1, "expert_parallel_size": 4, "dispatcher": "all_to_all"},
    ),
    "dualpipe pp2, 1 microbatch": (2, {"pipeline_parallel_size": 2, "num_microbatches": 1}),
    "dualpipe pp4, 2 microbatches": (4, {"pipeline_parallel_size": 4, "num_microbatches": 2}),
}
NODES = {"pp1 ep4 on two nodes": 2}
VARIANTS: dict[str, dict[str, Any]] = {  # name -> what is different from the plain Run
    "accumulation over 2 batches": {"accumulate": 2, "steps": 15},
    "a user's own model": {"model": "gpt"},
    "padded sequences": {"padded": True},
    "tied embeddings": {"overrides": {"tie_word_embeddings": True}},
    "two depths of multi-token prediction": {"overrides": {"num_nextn_predict_layers": 2}, "steps": 10},
    "without multi-token prediction": {"overrides": {"num_nextn_predict_layers": 0}, "steps": 10},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("layouts"))


_ALONE: dict[str, Result] = {}


def in_one_process(run: Run) -> Result:
    """Computed once for all layouts that are compared with it."""
    key = repr(run)
    if key not in _ALONE:
        _ALONE[key] = train(0, run)
    return _ALONE[key]


def check_equal(run: Run, *, tolerance: float) -> None:
    alone = in_one_process(replace(run, strategy=None, world=1, nodes=1))
    results = train_everywhere(run)

    losses, norms = same_everywhere(results), torch.tensor(results[0].norms, dtype=torch.float64)
    expected = torch.tensor(alone.losses, dtype=torch.float64)
    assert expected[-1] < expected[0] - 0.5, "the run must learn something, or equality says little"
    assert (losses - expected).abs().max() <= tolerance
    torch.testing.assert_close(norms, torch.tensor(alone.norms, dtype=torch.float64), rtol=tolerance, atol=tolerance)
    if tolerance < 1e-6:
        assert gathered(results, "counts") == alone.counts
        assert gathered(results, "biases") == alone.biases


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_routing_are_those_of_one_process(layout: str, corpus: str) -> None:
    world, strategy = LAYOUTS[layout]
    check_equal(Run(strategy=strategy, world=world, nodes=NODES.get(layout, 1), corpus=corpus), tolerance=1e-9)


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*(("dualpipe pp2 ep2", variant) for variant in VARIANTS), ("1f1b pp4", "tied embeddings")],
)
def test_variants_of_the_run_are_those_of_one_process(layout: str, variant: str, corpus: str) -> None:
    world, strategy = LAYOUTS[layout]
    check_equal(Run(strategy=strategy, world=world, corpus=corpus, **VARIANTS[variant]), tolerance=1e-9)


def test_batches_that_are_accumulated_move_the_biases_as_one_large_batch_does(corpus: str) -> None:
    at_once = in_one_process(Run(corpus=corpus, global_batch=8))
    in_two = in_one_process(Run(corpus=corpus, global_batch=4, accumulate=2))
    assert in_two.biases == at_once.biases
    assert in_two.counts == at_once.counts
    assert any(bias for biases in at_once.biases.values() for bias in biases)


@pytest.mark.parametrize("num_microbatches", [3, 5])
def test_an_odd_number_of_microbatches_gives_the_same_losses(num_microbatches: int, corpus: str) -> None:
    strategy = {"pipeline_parallel_size": 2, "num_microbatches": num_microbatches}
    run = Run(strategy=strategy, world=2, corpus=corpus, steps=10, global_batch=num_microbatches * 2)
    check_equal(run, tolerance=1e-9)


@pytest.mark.parametrize("layout", ["dualpipev pp2", "dualpipe pp2 ep2"])
def test_in_float32_losses_agree_to_2e_4(layout: str, corpus: str) -> None:
    world, strategy = LAYOUTS[layout]
    check_equal(Run(strategy=strategy, world=world, corpus=corpus, precision="32-true"), tolerance=2e-4)
