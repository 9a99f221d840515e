"""The same module on the same text gives the same losses, norms, router biases and token counts under every layout.

``Trainer(strategy="auto")`` in one process is the oracle. Losses are sums over tokens divided by the
number of tokens of the global batch, so layouts differ in the order of additions only: 1e-9 in
float64 leaves six orders of magnitude for 30 steps of AdamW to amplify that.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from lightning_dualpipe.deepseek_v3.recompute import Recompute
from tests.ranks import Cases
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
MORE_LAYOUTS = {  # for other settings alone
    "dualpipev pp2 ep2": (4, {"schedule": "dualpipev", "pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "zb1p pp2 ep2": (4, {"schedule": "zb1p", "pipeline_parallel_size": 2, "expert_parallel_size": 2}),
}
NODES = {"pp1 ep4 on two nodes": 2}
OTHER_WAYS = ("pp1 ep4 on two nodes", "pp1 ep4, one row per expert")  # of tokens to experts, in a layout that is there
EIGHT_STAGES = {"dualpipev pp4"}  # for which four blocks are too few
# Each layout once more: a launch order ("off": nothing overlaps), what is recomputed, and how tokens are routed. Every
# two settings meet in some row; all of them meet in tests/pipeline/test_gradients.py.
SETTINGS: dict[str, tuple[str, Recompute, str]] = {
    "dualpipe pp2": ("off", "none", "starved"),
    "dualpipe pp4": ("off", "selective", "uneven"),
    "dualpipev pp2": ("off", "full", "uneven"),
    "dualpipev pp4": ("traced", "selective", "starved"),
    "zb1p pp4": ("traced", "full", "uneven"),
    "1f1b pp4": ("off", "full", "starved"),
    "gpipe pp4": ("traced", "selective", "uneven"),
    "dualpipe pp2 dp2": ("eager", "full", "starved"),
    "dualpipe pp2 ep2": ("traced", "selective", "starved"),
    "dualpipev pp2 ep2": ("off", "full", "uneven"),
    "zb1p pp2 ep2": ("traced", "full", "uneven"),
    "pp1 ep2": ("eager", "selective", "starved"),
    "pp1 ep4": ("traced", "full", "starved"),
    "pp1 ep4 on two nodes": ("off", "selective", "starved"),
    "pp1 ep4, one row per expert": ("traced", "none", "uneven"),
    "dualpipe pp2, 1 microbatch": ("traced", "selective", "uneven"),
    "dualpipe pp4, 2 microbatches": ("eager", "full", "uneven"),
}
EVALUATED = {"limit_val_batches": 2, "val_check_interval": 5, "num_sanity_val_steps": 0}
VARIANTS: dict[str, dict[str, Any]] = {  # name -> what is different from the plain Run
    "a user's own model": {"model": "gpt", "steps": 10},
    "padded sequences": {"padded": True, "steps": 10},
    "tied embeddings": {"overrides": {"tie_word_embeddings": True}, "steps": 10},
    "two depths of multi-token prediction": {"overrides": {"num_nextn_predict_layers": 2}, "steps": 10},
    "without multi-token prediction": {"overrides": {"num_nextn_predict_layers": 0}, "steps": 10},
}
VARIED = [
    *(("dualpipe pp2 ep2", variant) for variant in VARIANTS),
    ("1f1b pp4", "tied embeddings"),
    ("pp1 ep2", "tied embeddings"),
    *(("pp1 ep4", variant) for variant in ("padded sequences", "two depths of multi-token prediction")),
]


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


def check_equal(run: Run, *, tolerance: float, results: list[Result] | None = None) -> Result:
    alone = in_one_process(replace(run, strategy=None, world=1, nodes=1, recompute="none", order=None))
    results = results or train_everywhere(run)

    losses, norms = same_everywhere(results), torch.tensor(results[0].norms, dtype=torch.float64)
    expected = torch.tensor(alone.losses, dtype=torch.float64)
    assert expected[-1] < expected[0] - 0.5, "the run must learn something, or equality says little"
    assert (losses - expected).abs().max() <= tolerance
    torch.testing.assert_close(norms, torch.tensor(alone.norms, dtype=torch.float64), rtol=tolerance, atol=tolerance)
    for result in results:
        assert result.evaluated == pytest.approx(alone.evaluated, abs=tolerance)
    if tolerance < 1e-6:
        assert gathered(results, "counts") == alone.counts
        assert gathered(results, "biases") == alone.biases
    return alone


_TOGETHER: dict[str, Cases] = {}


def runs_of(layout: str, corpus: str) -> dict[str, Run]:
    world, strategy = {**LAYOUTS, **MORE_LAYOUTS}[layout]
    order, recompute, routing = SETTINGS[layout]
    depth = {} if layout in EIGHT_STAGES else {"num_hidden_layers": 4}
    plain = Run(strategy=strategy, world=world, nodes=NODES.get(layout, 1), corpus=corpus, overrides=depth)
    if layout in OTHER_WAYS:
        plain = replace(plain, steps=10)
    other = replace(
        plain,
        strategy={**strategy, "overlap": order != "off"},
        order=None if order == "off" else order,
        recompute=recompute,
        routing=routing,
        steps=5,
        accumulate=2,
        trainer=EVALUATED,
    )
    return {"plain": plain, "other settings": other} if layout in LAYOUTS else {"other settings": other}


def results_of(layout: str, name: str, corpus: str) -> list[Result]:
    """Both runs of a layout share their processes."""
    if layout not in _TOGETHER:
        runs = runs_of(layout, corpus)
        world = runs["other settings"].world
        _TOGETHER[layout] = Cases(world, train, {each: (run,) for each, run in runs.items()}, timeout=240)
    return _TOGETHER[layout][name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_routing_are_those_of_one_process(layout: str, corpus: str) -> None:
    run = runs_of(layout, corpus)["plain"]
    check_equal(run, tolerance=1e-9, results=results_of(layout, "plain", corpus))


@pytest.mark.parametrize("layout", SETTINGS)
def test_so_they_are_in_any_order_recomputed_and_with_experts_that_starve(layout: str, corpus: str) -> None:
    """Over accumulated batches, with evaluations between them."""
    run = runs_of(layout, corpus)["other settings"]
    alone = check_equal(run, tolerance=1e-9, results=results_of(layout, "other settings", corpus))
    assert len(alone.evaluated) == 2
    starving = not any(count for counts in alone.counts.values() for count in counts[len(counts) // 2 :])
    assert starving == (run.routing == "starved")


def test_every_two_settings_meet() -> None:
    plain = ("eager", "none", "even")
    for one, other in ((0, 1), (0, 2), (1, 2)):
        kinds = {settings[one] for settings in SETTINGS.values()}, {settings[other] for settings in SETTINGS.values()}
        met = {(settings[one], settings[other]) for settings in (*SETTINGS.values(), plain)}
        assert met >= set(product(*kinds))


@pytest.mark.parametrize(("layout", "variant"), VARIED)
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
    run = Run(strategy=strategy, world=world, corpus=corpus, precision="32-true")
    check_equal(replace(run, overrides={"num_hidden_layers": 4}), tolerance=2e-4)
