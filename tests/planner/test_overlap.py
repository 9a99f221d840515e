"""Two streams by hand, and their bounds."""

import random
from dataclasses import astuple, fields, replace

import pytest

from lightning_dualpipe.planner import DEEPSEEK, LayerTimes, pair, stage_times

ONE = LayerTimes(*[1.0] * 10)


def random_layers(draw: random.Random, count: int) -> list[LayerTimes]:
    return [LayerTimes(*(draw.choice([0.0, draw.uniform(0, 3)]) for _ in fields(LayerTimes))) for _ in range(count)]


def test_a_pair_by_hand():
    # compute         attn(F)  mlp(B)      mlp(W)  mlp(F)  attn(B)  attn(W)
    # communication   comb(B)  disp(F) disp(B)        .    comb(F)
    #                 0        1       2       3       4        5        6
    assert pair([ONE], [ONE]) == 6
    # The next layer begins where this one ends, and its first combine hides behind attn(W).
    assert pair([ONE] * 3, [ONE] * 3) == 18


def test_a_lone_backward_by_hand():
    # compute                   mlp(B)   mlp(W)   attn(B)  attn(W)
    # communication    comb(B)           disp(B)
    #                  0        1        2        3        4       5
    times = stage_times([ONE])
    assert times.backward == 5
    assert times.backward_input == 4
    assert times.backward_weight == 2
    assert times.forward == 4
    assert stage_times([ONE], hide_alone=False).backward == 6


@pytest.mark.parametrize("seed", range(30))
def test_nothing_takes_less_than_either_stream_or_more_than_all_in_turn(seed):
    draw = random.Random(seed)
    forward, backward = random_layers(draw, draw.randint(0, 5)), random_layers(draw, draw.randint(0, 5))
    there, back = stage_times(forward), stage_times(backward, hide_alone=False)
    both = pair(forward, backward)
    compute = sum(x.attention_forward + x.experts_forward for x in forward)
    compute += sum(x.attention_input + x.attention_weight + x.experts_input + x.experts_weight for x in backward)
    total = there.forward + back.backward
    slack = 1 + 1e-12
    assert compute <= both * slack
    assert total - compute <= both * slack
    assert both <= total * slack
    assert stage_times(backward).backward <= back.backward * slack
    assert back.backward_input <= stage_times(backward).backward * slack


def test_layers_without_experts_need_no_cases():
    silent = dict.fromkeys((f.name for f in fields(LayerTimes) if f.name.startswith(("dispatch", "combine"))), 0.0)
    dense = replace(ONE, **silent)
    assert pair([dense], [dense]) == sum(astuple(dense)) == 6
    assert pair([dense, ONE], [ONE]) >= pair([ONE], [ONE])
    assert pair([], [ONE]) == stage_times([ONE]).backward
    assert pair([ONE], []) == stage_times([ONE]).forward


def test_more_layers_hide_more():
    """Only the first combine of the backward and the last of the forward are out in the open."""
    times = DEEPSEEK.times
    ratios = [pair([times] * count, [times] * count) / (count * times.compute) for count in (1, 2, 4, 8, 16)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.01
