"""Expected places of a token, against drawing tokens at random."""

import random
from dataclasses import replace

import pytest

from lightning_dualpipe.planner import HARDWARE
from lightning_dualpipe.planner.routing import journey, places_of_a_token
from tests.planner.shapes import shape


def drawn(model, places, draw):
    per_group = model.num_experts // model.num_groups
    groups = draw.sample(range(model.num_groups), model.groups_per_token)
    experts = [group * per_group + index for group in groups for index in range(per_group)]
    chosen = draw.sample(experts, model.experts_per_token)
    return len({expert * places // model.num_experts for expert in chosen})


@pytest.mark.parametrize("places", [1, 2, 4, 8, 16, 64, 256])
def test_places_are_those_of_random_tokens(places):
    draw, model = random.Random(0), shape()
    mean = sum(drawn(model, places, draw) for _ in range(4000)) / 4000
    assert places_of_a_token(model, places) == pytest.approx(mean, rel=0.02)  # a standard error is below 0.4 %


def test_groups_and_places_that_cut_each_other_count_as_ungrouped():
    model = replace(shape(), num_experts=24, num_groups=8, groups_per_token=4, experts_per_token=2)
    assert places_of_a_token(model, 3) == pytest.approx(3 * (1 - (16 * 15) / (24 * 23)))


def test_a_token_crosses_the_network_to_few_nodes():
    """Section 2.1.2 of the report: at most 4 of 8 nodes, and one of them may be its own."""
    way = journey(shape(), 64, HARDWARE["h800"])
    assert 3 < way.nodes < 3.5
    assert 7 < way.ranks < 8
    inside = journey(shape(), 8, HARDWARE["h800"])
    assert inside.nodes == 0
    assert 0 < inside.ranks < 8


def test_fp8_halves_the_bytes_and_not_the_rows():
    way, hardware = journey(shape(), 64, HARDWARE["h800"]), HARDWARE["h800"]
    rows = way.seconds(0, 4096, hardware)
    fp8, bf16 = (way.seconds(width, 4096, hardware) for width in (7168, 2 * 7168))
    assert (bf16 - rows) == pytest.approx(2 * (fp8 - rows))
