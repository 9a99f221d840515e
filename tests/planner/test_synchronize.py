"""The end of a step by hand."""

from dataclasses import replace

import pytest

from lightning_dualpipe.planner import HARDWARE
from lightning_dualpipe.planner.layout import Layout
from lightning_dualpipe.planner.memory import Near, Storage
from lightning_dualpipe.planner.synchronize import synchronization

LINKS = replace(HARDWARE["h800"], nvlink=100e9, network=50e9, memory_bandwidth=1e12)
STORAGE = Storage(gradient_bytes=4, optimizer_bytes=12)


def exposed(layout, parameters, *, window=0.0, num_layers=8):
    return synchronization(layout, parameters, STORAGE, LINKS, window=window, num_layers=num_layers)


def test_dense_parameters_go_around_the_node_first():
    """256 replicas in 32 nodes: 7/8 over NVLink is slower than 31/32 of an eighth over the network."""
    found = exposed(Layout(2048, 16, 64, "dualpipe", 1, 120), Near(dense=10**9, experts=0))
    assert found.reduce == pytest.approx(4e9 * 7 / 8 / 100e9)
    assert found.gather == pytest.approx(2e9 * 7 / 8 / 100e9)
    assert found.update == pytest.approx(1e9 / 256 * (2 * 12 + 4 + 2) / 1e12)


def test_replicas_of_experts_have_the_network_alone():
    """128 data ranks / 64 expert ranks x 2 copies: 4, each in another node."""
    found = exposed(Layout(2048, 16, 64, "dualpipe", 1, 120), Near(dense=0, experts=10**9))
    assert found.reduce == pytest.approx(4e9 * 3 / 4 / 50e9)


def test_the_last_weight_gradients_hide_all_but_one_layer():
    layout, parameters = Layout(2048, 16, 64, "dualpipe", 1, 120), Near(dense=0, experts=10**9)
    whole = exposed(layout, parameters).reduce
    assert exposed(layout, parameters, window=whole / 4).reduce == pytest.approx(whole * 3 / 4)
    assert exposed(layout, parameters, window=10 * whole).reduce == pytest.approx(whole / 8)


def test_what_has_no_replicas_needs_no_network():
    found = exposed(Layout(16, 16, 1, "1f1b", 1, 120), Near(dense=10**9, experts=10**9))
    assert found.reduce == found.gather == 0
    assert found.update > 0
