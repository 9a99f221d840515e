from types import SimpleNamespace

import pytest
import torch

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.choice import choose_dispatcher, node_hints
from lightning_dualpipe.parallel.layout import ParallelLayout

CPU = torch.device("cpu")


def choose(wanted, layout):
    return choose_dispatcher(wanted, layout, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "name", "reasons"),
    [
        (ParallelLayout(4, expert=4), "node", ["sent to each rank once", "this run computes on cpu"]),
        (ParallelLayout(8, expert=8, per_node=4), "node", ["each of the 2 nodes", "this run computes on cpu"]),
        (ParallelLayout(8, pipeline=2, expert=2, per_node=1), "node", ["each of the 2 nodes"]),
        (ParallelLayout(12, expert=6, per_node=4), "all_to_all", ["6 ranks do not lie evenly on nodes of 4"]),
    ],
)
def test_auto_takes_the_best_that_can_run_and_says_why(layout, name, reasons):
    chosen = choose("auto", layout)
    assert chosen.name == name and all(reason in str(chosen) for reason in reasons)


@pytest.mark.parametrize("name", ["all_to_all", "node"])
def test_what_is_asked_for_is_taken(name):
    assert choose(name, ParallelLayout(4, expert=4)).name == name


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("deepep", ParallelLayout(4, expert=4), "dispatcher='deepep' cannot run: DeepEP needs CUDA devices"),
        ("node", ParallelLayout(12, expert=6, per_node=4), "use a divisor or a multiple of that; dispatcher='auto'"),
    ],
)
def test_what_cannot_run_is_refused(name, layout, message):
    with pytest.raises(ConfigurationError, match=message):
        choose(name, layout)


@pytest.mark.parametrize(
    ("groups", "top", "hint"),
    [
        (8, 4, None),
        (16, 4, None),
        (1, 1, "n_group=1 does not map onto the 8 nodes"),
        (4, 2, "n_group=4 does not map onto the 8 nodes"),
        (8, 8, "topk_group=8 lets a token go to all 8 nodes"),
    ],
)
def test_groups_that_do_not_spare_the_network_get_a_hint(groups, top, hint):
    routers = [SimpleNamespace(num_groups=groups, top_groups=top)] * 3
    hints = node_hints(routers, ParallelLayout(64, expert=64, per_node=8))
    assert hints == [] if hint is None else (len(hints) == 1 and hint in hints[0])
    assert node_hints(routers, ParallelLayout(8, expert=8)) == []


def test_an_expert_group_lies_evenly_on_nodes_or_on_one():
    """Eight ranks, two pipeline ranks, experts over four data ranks, two ranks on a node."""
    layout = ParallelLayout(8, pipeline=2, expert=4, per_node=2)
    assert layout.expert_nodes == 2
    assert [layout.expert_ranks_within(rank) for rank in (0, 3, 5)] == [(0, 1), (2, 3), (4, 5)]
    assert [layout.expert_ranks_across(rank) for rank in (0, 3, 5)] == [(0, 2), (1, 3), (5, 7)]
