"""Bytes on a rank, by hand and in sum."""

from dataclasses import asdict, replace

import pytest

from lightning_dualpipe.planner import Kept
from lightning_dualpipe.planner.layout import Layout
from lightning_dualpipe.planner.memory import Memory, Storage, largest_memory, near
from lightning_dualpipe.planner.stages import cut
from tests.planner.shapes import moe_layer, only, shape

SCHEDULES = ["dualpipe", "dualpipev", "zb1p", "1f1b", "gpipe"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_parts_add_up(schedule):
    memory = only(schedule=schedule).memory
    assert memory.total == pytest.approx(sum(asdict(memory).values()))
    assert all(part >= 0 for part in asdict(memory).values())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_optimizer_states_are_the_total_over_the_replicas(schedule):
    """ZeRO-1: summed over all ranks, each parameter has its 12 bytes once, whatever the schedule doubles."""
    layout = Layout(2048, 16, 64, schedule, 1, 120)
    stages = cut(shape(), layout.num_stages, mirrored=layout.placement.is_mirrored)
    total = 0.0
    for rank in range(layout.pipeline):
        parameters = near(layout, stages, rank)
        total += layout.data * parameters.dense / layout.replicas
        total += layout.data * parameters.experts / layout.expert_replicas
    copied = 0 if schedule in ("dualpipe", "dualpipev") else 129280 * 7168  # MTP's embedding, on the last rank
    assert 12 * total == pytest.approx(12 * (shape().parameters + copied))


def even(schedule: str, storage: Storage) -> Memory:
    """DeepSeek's layout of 64 equal layers, four a stage."""
    model = replace(shape(), layers=tuple(replace(moe_layer(shape()), name=str(index)) for index in range(64)))
    return largest_memory(Layout(2048, 16, 64, schedule, 1, 120), model, cut(model, 16), storage)


def test_the_second_copy_of_dualpipe_costs_weights_and_gradients_only():
    one, two = (even(schedule, Storage(fp8=True)) for schedule in ("zb1p", "dualpipe"))
    assert two.weights == 2 * one.weights
    assert two.gradients == 2 * one.gradients
    assert two.optimizer == pytest.approx(one.optimizer)
    assert two.activations == pytest.approx(17 / 16 * one.activations)


def test_what_a_moe_layer_keeps_by_hand():
    """Per token of the 671B model, FP8, with the report's recomputation.

    BF16: two residual streams, latents of 1536 and 512 + 64, attention's output, a float a head
    FP8:  8 dispatched copies, and the inputs of 9 SwiGLUs
    """
    kept = moe_layer(shape()).kept
    plain = 2 * 7168 + 1536 + 576 + 128 * 128 + 2 * 128
    assert kept.bytes(fp8=True, recompute=True) == 2 * plain + 8 * 7168 + 9 * 2 * 2048
    assert kept.bytes(fp8=False, recompute=True) == 2 * (plain + 8 * 7168 + 9 * 2 * 2048)


def test_recomputation_and_fp8_keep_less():
    kept = Kept(plain=1, cast=2, plain_again=3, cast_again=4)
    assert kept.bytes(fp8=False, recompute=False) == 2 * (1 + 2 + 3 + 4)
    assert kept.bytes(fp8=True, recompute=False) == 2 * (1 + 3) + 2 + 4
    assert kept.bytes(fp8=True, recompute=True) == 2 * 1 + 2
    assert only(recompute=True).memory.activations < only(recompute=False).memory.activations
    assert only(precision="fp8").memory.activations < only(precision="bf16").memory.activations


def test_smaller_gradients_and_states_are_counted():
    memory, smaller = even("dualpipe", Storage()), even("dualpipe", Storage(gradient_bytes=2, optimizer_bytes=8))
    assert smaller.gradients == memory.gradients / 2
    assert smaller.optimizer == pytest.approx(memory.optimizer * 8 / 12)
    assert smaller.weights == memory.weights
