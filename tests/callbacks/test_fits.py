"""What callbacks report does not depend on the layout, and every rank reports the same."""

import re

import pytest

from lightning_dualpipe import DeepSeekV3
from tests.callbacks.fits import EVERY, GLOBAL_BATCH, LAYOUTS, outcomes
from tests.strategy.runs import Run, build_module

pytestmark = pytest.mark.parametrize("layout", LAYOUTS)
SEQUENCE_LENGTH = 16
LAYERS = [*(f"blocks.{index}" for index in range(1, 6)), "mtp.0"]


def of_load(logged: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in logged.items() if name.startswith(("max_violation", "dead_experts"))}


def test_a_token_of_the_global_batch_counts_once(layout: str) -> None:
    for outcome in outcomes(layout):
        rates = [logged["tokens_per_second"] for logged in outcome.logged]
        assert rates == [GLOBAL_BATCH * SEQUENCE_LENGTH] * 2  # a second a step; validation is not counted


def test_every_rank_logs_the_load_of_every_layer(layout: str) -> None:
    for outcome in outcomes(layout):
        for logged in outcome.logged:
            names = [name for name in of_load(logged) if "/" in name]
            assert names == [f"max_violation/{layer}" for layer in LAYERS]
            assert logged["max_violation"] == max(logged[name] for name in names)
            assert 0 <= logged["dead_experts"] <= 4 * len(LAYERS)


def test_the_load_is_that_of_one_process(layout: str) -> None:
    (alone,) = outcomes("auto")
    for outcome in outcomes(layout):
        assert list(map(of_load, outcome.logged)) == list(map(of_load, alone.logged))


def test_the_curves_are_those_of_one_process(layout: str) -> None:
    (alone,) = outcomes("auto")
    for outcome in outcomes(layout):
        assert [step for step, _ in outcome.training] == [1, EVERY, 2 * EVERY]
        assert [step for step, _ in outcome.validation] == [EVERY, 2 * EVERY]
        # ddp reports the training loss of rank 0's share of the batch
        compared = outcome.validation if layout == "ddp" else outcome.training + outcome.validation
        expected = alone.validation if layout == "ddp" else alone.training + alone.validation
        assert compared == [(step, pytest.approx(loss, rel=1e-9)) for step, loss in expected]


def test_the_report_names_what_is_there(layout: str) -> None:
    first, *others = outcomes(layout)
    last = first.said.rstrip().splitlines()[-6:]
    found = dict(
        line.split("   ", 1) for line in last if line.startswith(("checkpoint", "metrics log", "loss picture"))
    )
    paths = [path.strip() for path in found.values()]

    assert len(paths) == 3
    assert set(paths) <= set(first.written)
    assert not any("metrics log" in other.said for other in others)


def test_the_largest_peak_of_all_ranks_is_logged_and_reported(layout: str) -> None:
    first, *others = outcomes(layout)
    peaks = [logged["peak_memory_gib"] for logged in first.logged]
    assert 0.1 < peaks[0] <= peaks[1] < 10  # gibibytes of a process that has loaded torch
    assert all([logged["peak_memory_gib"] for logged in other.logged] == peaks for other in others)
    world = LAYOUTS[layout][0]
    (line,) = re.findall(r"^peak memory +(.+)$", first.said, flags=re.MULTILINE)
    spread = rf"[\d.]+ GiB on rank [0-{world - 1}]; [\d.]+ GiB on rank [0-{world - 1}], the least of {world}"
    assert re.fullmatch(spread if world > 1 else r"[\d.]+ GiB", line)
    assert float(line.split()[0]) >= round(peaks[-1], 2) - 0.01


def test_a_pipeline_has_its_schedule_drawn(layout: str) -> None:
    first = outcomes(layout)[0]
    if LAYOUTS[layout][1] is None:
        assert "schedule picture" not in first.said
    else:
        assert "runs/test/version_0/schedule.png" in first.written


def test_the_summary_counts_the_whole_model(layout: str) -> None:
    first, *others = outcomes(layout)
    arguments = LAYOUTS[layout][1]
    module = build_module(Run())
    assert isinstance(module, DeepSeekV3)
    total = sum(parameter.numel() for parameter in module.parameters())
    if arguments is None:
        assert "stage  layers" not in first.said  # Lightning's own is right
        return
    assert f"DeepSeekV3: {total:,} parameters, {module.num_active_parameters():,} used by a token" in first.said
    row = r"^ +(\d+)  (\S+)(?: \.\.\. (\S+))? +([\d,]+)  ([\d ]+)$"  # of one layer or of several
    stages = re.findall(row, first.said, flags=re.MULTILINE)
    assert [int(index) for index, *_ in stages] == list(range(arguments["pipeline_parallel_size"]))
    assert (stages[0][1], stages[-1][2]) == ("embed_tokens", "lm_head")
    embedding = module.model.embed_tokens.weight.numel()  # the first stage's, and that of multi-token prediction
    assert sum(int(size.replace(",", "")) for *_, size, _ in stages) == total + embedding
    assert not any("stage  layers" in other.said for other in others)
