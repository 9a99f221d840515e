"""Which layouts are found, how they are ordered, and what is refused."""

import json
import time
from dataclasses import replace

import pytest

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.planner import DEEPSEEK, HARDWARE, Request, hardware_named, make_plan, plan_json, plan_text
from tests.planner.shapes import only, request, shape


def small(**asked):
    return Request(**{"model": shape("16b"), "hardware": HARDWARE["h100"], "gpus": 64, "batch_sequences": 256, **asked})


def test_the_fastest_layout_that_fits_is_recommended():
    plan = make_plan(small())
    assert plan.recommended == plan.fitting[0]
    steps = [one.step for one in plan.fitting]
    assert steps == pytest.approx(sorted(steps), rel=1e-5)  # equally fast ones are ordered by what they need
    assert all(one.fits and one.memory.total <= 80e9 for one in plan.fitting)
    assert all(one.memory.total > 80e9 for one in plan.too_large)


def test_sizes_divide():
    for one in make_plan(small()).fitting:
        layout = one.layout
        assert layout.pipeline * layout.data == 64
        assert layout.data % layout.expert == 0
        assert 64 % layout.expert == 0
        assert layout.data * layout.num_microbatches * layout.sequences == 256
        assert layout.schedule != "dualpipe" or layout.pipeline % 2 == 0


def test_the_parts_of_a_step_add_up():
    plan = make_plan(small())
    for one in (*plan.fitting, *plan.too_large):
        parts = one.compute + one.exposed + one.bubble + one.synchronization
        assert parts == pytest.approx(one.step), str(one.layout)
        assert min(one.compute, one.exposed, one.bubble, one.synchronization) >= 0
        assert 0 <= one.mfu < 1
        assert one.tokens_per_second_per_gpu * one.step * 64 == pytest.approx(256 * 4096)


def test_more_memory_never_makes_fewer_layouts_fit():
    counts = []
    for memory in (20e9, 40e9, 80e9, 160e9, 1e12):
        hardware = replace(HARDWARE["h800"], memory=memory)
        counts.append(len(make_plan(request(hardware=hardware, schedules=("dualpipe", "1f1b"))).fitting))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("rate", ["bf16_peak", "fp8_peak", "memory_bandwidth", "nvlink", "network"])
def test_faster_hardware_never_makes_a_step_longer(rate):
    slow = HARDWARE["h800"]
    fast = replace(slow, **{rate: 2 * getattr(slow, rate)})
    for schedule in ("dualpipe", "zb1p"):
        assert only(schedule=schedule, hardware=fast).step <= only(schedule=schedule).step


def test_overlap_is_never_slower():
    assert only(overlap=True).step < only(overlap=False).step
    assert only(overlap=True).exposed < only(overlap=False).exposed


def test_without_experts_there_is_nothing_to_hide():
    plan = make_plan(small(model=shape("16b", first_k_dense_replace=27, num_nextn_predict_layers=0)))
    assert plan.recommended is not None
    assert plan.recommended.communication == 0
    assert {one.layout.expert for one in plan.fitting} >= {1}


def test_100_000_gpus_are_planned_in_seconds():
    start = time.process_time()
    plan = make_plan(request(gpus=100_000, batch_sequences=200_000))
    assert plan.recommended is not None
    assert time.process_time() - start < 30  # 2 to 3 seconds alone on a core of the development machine


def test_json_has_everything_of_the_table():
    plan = make_plan(small())
    content = json.loads(plan_json(plan, top=3))
    assert content["format"] == "lightning-dualpipe-plan/1"
    assert content["num_fitting"] == len(plan.fitting)
    assert content["recommended"] == content["fitting"][0]
    assert len(content["fitting"]) == 3
    assert set(content["fitting"][0]) == {
        *("schedule", "pipeline", "data", "expert", "microbatch_sequences", "num_microbatches", "step", "compute"),
        *("exposed_communication", "communication", "bubble", "synchronization", "tokens_per_second_per_gpu"),
        *("gpu_hours_per_trillion_tokens", "mfu", "memory"),
    }
    memory = content["fitting"][0]["memory"]
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert all(one["reason"].startswith("needs ") for one in content["too_large"])


def test_the_table_says_why_others_do_not_fit():
    text = plan_text(make_plan(request()), top=6)
    assert "recommended: DualPipeStrategy(pipeline_parallel_size=" in text
    assert "too large for 80 GB, the smallest first:" in text
    assert "GB (activations " in text
    assert "pipeline 1: 2048 pipelines do not divide a batch of 15360 sequences" in text


def test_where_nothing_fits_the_nearest_are_shown():
    text = plan_text(make_plan(request(hardware=replace(HARDWARE["h800"], memory=1e9))))
    assert text.splitlines()[3].startswith("0 of ")
    assert "too large for 1 GB" in text
    assert "recommended" not in text


def test_everything_wrong_with_a_request_is_one_error():
    with pytest.raises(ConfigurationError) as caught:
        request(gpus=0, batch_sequences=-1, expert=48, schedules=("dualpip",), gradient_bytes=-2, profile=DEEPSEEK)
    said = str(caught.value)
    assert "gpus=0: at least 1 is needed" in said
    assert "batch_sequences=-1: at least 1 is needed" in said
    assert "expert=48 does not divide the 256 experts of 671b" in said
    assert "schedule='dualpip' is none of dualpipe" in said
    assert "did you mean 'dualpipe'?" in said
    assert "gradient_bytes=-2" in said


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"gpus": 2047, "pipeline": 16}, "pipeline=16 does not divide gpus=2047"),
        ({"batch_sequences": 15361, "pipeline": 16}, "pipeline 16: 128 pipelines do not divide a batch of 15361"),
        ({"pipeline": 64}, "has 64 stages, the model 63 layers"),
        ({"pipeline": 16, "microbatch_sequences": 7}, "microbatches of 7 do not divide the 120 sequences"),
        ({"pipeline": 32, "expert": 128}, "expert 128 must divide 64 data ranks"),
        ({"hardware": HARDWARE["a100"]}, "a100 has no FP8 matrix units; plan with bf16"),
        ({"precision": "fp4"}, "precision='fp4' is neither fp8 nor bf16"),
        ({"precision": "bf16", "profile": DEEPSEEK}, "the profile was measured in fp8"),
    ],
)
def test_what_cannot_be_is_refused(asked, reason):
    with pytest.raises(ConfigurationError, match=reason.replace("'", ".")):
        make_plan(request(**asked))


def test_an_unknown_gpu_is_corrected():
    assert hardware_named("H800") is HARDWARE["h800"]
    with pytest.raises(ConfigurationError, match=r"gpu='h80' is none of .*did you mean 'h800'\?"):
        hardware_named("h80")
