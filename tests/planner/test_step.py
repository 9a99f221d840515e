"""The closed forms against the simulator they stand for."""

import random

import pytest

from lightning_dualpipe.planner import StageTimes
from lightning_dualpipe.planner.step import held_microbatches, pipeline_seconds
from lightning_dualpipe.schedules import SCHEDULES, Costs, build_schedule, simulate
from lightning_dualpipe.schedules.action import Kind, Schedule


def stages_of(name: str, ranks: int) -> int:
    return 2 * ranks if name == "dualpipev" else ranks


def both(name, ranks, microbatches, forward, input_, weight, overlapped, send=0.0):
    """The closed form and the simulation; durations are one number per stage."""
    schedule = build_schedule(name, ranks, microbatches)
    simulated = simulate(schedule, Costs(*map(tuple, (forward, input_, weight, overlapped)), send)).duration
    stages = [StageTimes(f, i + w, i, w, 0, 0) for f, i, w in zip(forward, input_, weight, strict=True)]
    count = schedule.num_stages
    pairs = [(overlapped[r] + overlapped[count - 1 - r]) / 2 for r in range((count + 1) // 2)]
    return pipeline_seconds(name, microbatches, stages, pairs, send), simulated


def ranks_for(name: str, draw: random.Random) -> int:
    return draw.choice([2, 4, 6, 8, 16]) if name == "dualpipe" else draw.randint(1, 12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(8))
def test_equal_stages_take_exactly_what_the_simulator_says(name, seed):
    draw = random.Random(seed)
    ranks = ranks_for(name, draw)
    count = stages_of(name, ranks)
    f, i, w = (draw.uniform(1, 3) for _ in range(3))
    pair = draw.uniform(max(f, i + w), f + i + w)
    microbatches = count * draw.randint(2, 6) + 2 * draw.randint(0, 2)
    closed, simulated = both(name, ranks, microbatches, *([value] * count for value in (f, i, w, pair)))
    assert closed == pytest.approx(simulated, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(12))
def test_unequal_stages_are_within_six_per_cent_with_many_microbatches(name, seed):
    """By a fifth to either side: which ranks wait for which then depends on the order of slow and fast stages."""
    draw = random.Random(seed)
    ranks = ranks_for(name, draw)
    count = stages_of(name, ranks)
    f, i, w = (draw.uniform(1, 3) for _ in range(3))
    pair = draw.uniform(max(f, i + w), f + i + w)
    unequal = [draw.uniform(0.8, 1.2) for _ in range(count)]
    times = ([value * factor for factor in unequal] for value in (f, i, w, pair))
    closed, simulated = both(name, ranks, count * draw.randint(4, 8), *times)
    assert closed == pytest.approx(simulated, rel=0.06)


def test_a_slow_last_stage_sets_the_pace():
    """As with a head and multi-token prediction: DeepSeek's proportions, the last stage a quarter slower."""
    for name in SCHEDULES:
        count = stages_of(name, 16)
        factors = [1.0] * (count - 1) + [1.25]
        times = [[value * factor for factor in factors] for value in (97.3, 111.6, 29.8, 125.7)]
        closed, simulated = both(name, 16, 120, *times)
        assert closed == pytest.approx(simulated, rel=0.03), name
        even, _ = both(name, 16, 120, *([value] * count for value in (97.3, 111.6, 29.8, 125.7)))
        assert closed > 1.08 * even, name


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p"])
@pytest.mark.parametrize("send", [0.05, 0.2])
def test_messages_cost_what_the_simulator_says(name, send):
    ones = [1.0] * 8
    closed, simulated = both(name, 8, 32, ones, ones, ones, [3.0] * 8, send)
    assert closed == pytest.approx(simulated, rel=0.02)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 7])
def test_few_microbatches_are_simulated(name, microbatches):
    count = stages_of(name, 4)
    closed, simulated = both(name, 4, microbatches, *([value] * count for value in (1.0, 1.0, 1.0, 2.2)))
    assert closed == pytest.approx(simulated, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 16), (8, 19)])
def test_no_stage_holds_more_than_the_closed_form_and_a_rank_as_much(name, ranks, microbatches):
    schedule = build_schedule(name, ranks, microbatches)
    held = held_microbatches(name, microbatches, schedule.num_stages)
    assert sum(held[stage] for stage in schedule.stages_on(0)) == max(simulate(schedule, Costs()).peak)
    for rank in range(ranks):
        for stage in schedule.stages_on(rank):
            assert most_held(schedule, rank, stage) <= held[stage] + (1 if name.startswith("dualpipe") else 0)


def most_held(schedule: Schedule, rank: int, stage: int) -> int:
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_INPUT: 0, Kind.BACKWARD_WEIGHT: -1}
    held = most = 0
    for action in (action for step in schedule.steps[rank] for action in step if action.stage == stage):
        held += change[action.kind]
        most = max(most, held)
    return most
