"""The planner against what others measured. Only DeepSeek's trace calibrates (test_calibration); the rest is predicted.

| figure                         | source                                                           |
|--------------------------------|------------------------------------------------------------------|
| 180K H800 hours per T tokens   | arXiv:2412.19437, table 1 and section 1                          |
| 128.5 ms, a pair of 4 layers   | github.com/deepseek-ai/profile-data, train.json                  |
| 1297 tokens/s/GPU, FP8         | Megatron-Bridge, docs/performance-summary-archive.md, 25.09      |
| 1061 tokens/s/GPU, BF16        | Megatron-Bridge, examples/model_verification_cards/deepseek-v3   |
"""

import pytest

from lightning_dualpipe.planner import DEEPSEEK, pair, side_by_side
from tests.planner.shapes import only


@pytest.mark.parametrize("profile", [None, DEEPSEEK], ids=["from FLOPs and bytes", "from their trace"])
def test_deepseek_v3_takes_180_000_h800_hours_per_trillion_tokens(profile):
    ours = only(profile=profile)
    assert ours.gpu_hours_per_trillion_tokens == pytest.approx(180_000, rel=0.10)
    assert ours.layout.data == 128
    assert ours.layout.num_microbatches == 120


def test_deepseek_v3_fits_into_80_gb():
    ours = only()
    assert ours.memory.total < 80e9
    assert ours.fits
    assert not only(recompute=False).fits  # which is why they recompute


def test_the_published_pair_of_four_layers():
    times = [DEEPSEEK.times] * 4
    assert pair(times, times) == pytest.approx(128.5e-3, rel=0.05)


def test_nearly_all_expert_traffic_of_the_pair_is_hidden():
    """96 % in the trace: both kinds of streams busy at once for 110.3 of 114.5 ms."""
    times = [DEEPSEEK.times] * 4
    hidden = 1 - (pair(times, times) - 4 * DEEPSEEK.times.compute) / (4 * DEEPSEEK.times.communication)
    assert hidden == pytest.approx(0.96, abs=0.04)


def test_megatron_in_fp8_on_1024_h100():
    """TP2 PP8 VP4 EP64, batch 8192, expert traffic overlapped with 1F1B's other half (moe_a2a_overlap=True).

    There is no tensor parallelism here: 16 GPUs a model are 16 pipeline ranks, which hold as many parameters each. Its
    interleaved pairs overlap as DualPipe's do, so DualPipe is compared.
    """
    ours = only("h100", gpus=1024, batch_sequences=8192)
    assert ours.tokens_per_second_per_gpu == pytest.approx(1297, rel=0.20)


def test_megatron_in_bf16_on_1024_h100():
    """The same layout without overlap (moe_a2a_overlap=False): 1F1B is compared, with the bubble of interleaving.

    Interleaved 1F1B fills in (PP - 1) / VP of a rank's forward and backward, 7 / 4 instead of 15.
    """
    ours = only("h100", schedule="1f1b", gpus=1024, batch_sequences=8192, precision="bf16")
    one = (ours.compute + ours.exposed) / ours.layout.num_microbatches
    interleaved = ours.step - 15 * one + 7 / 4 * one
    assert 8192 * 4096 / interleaved / 1024 == pytest.approx(1061, rel=0.20)


def test_the_schedules_side_by_side():
    """P = 16, M = 120, DeepSeek's times: what overlap buys, and how little the bare schedule does."""
    rows = {(row.schedule, row.overlap): row for row in side_by_side(DEEPSEEK.times, **PAPER)}
    speedups = {name: row.speedup for name, row in rows.items()}
    assert speedups["1f1b", False] == 1
    assert speedups["zb1p", False] == pytest.approx(1.03, abs=0.01)
    assert speedups["dualpipe", False] == pytest.approx(1.05, abs=0.01)
    assert speedups["dualpipe", True] == pytest.approx(1.73, abs=0.04)
    assert speedups["dualpipev", True] == pytest.approx(1.72, abs=0.04)
    assert [row.held for row in rows.values()] == [16, 16, 17, 17, 16.5, 16.5]


def test_a_1f1b_that_hides_its_own_backwards_is_the_harder_baseline():
    rows = side_by_side(DEEPSEEK.times, hide_alone=True, **PAPER)
    (dualpipe,) = (row for row in rows if row.schedule == "dualpipe" and row.overlap)
    assert dualpipe.speedup == pytest.approx(1.56, abs=0.02)


PAPER = {"layers_per_rank": 4, "pipeline": 16, "num_microbatches": 120}
