"""Rows that travel in FP8: under every dispatcher the very bits that the same rows give which travel as they are."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.all_to_all import Crossing
from lightning_dualpipe.parallel.deepep import DeepEPBuffers, DeepEPDispatcher
from lightning_dualpipe.parallel.dispatch import AllToAllDispatcher, LocalDispatcher
from lightning_dualpipe.parallel.node_dispatch import NodeDispatcher
from lightning_dualpipe.precision.fp8_rows import FP8Rows
from lightning_dualpipe.precision.recipe import Operand
from tests.parallel import test_deepep as deepep
from tests.parallel.test_dispatch import CASES, Case, _mine, layer
from tests.parallel.test_node_dispatch import TOKENS, brute_force, integers, linear_layer, routes, rows_of
from tests.ranks import run_ranks

ROWS = FP8Rows(Operand("e4m3", (1, 3), "power_of_two"))  # rows are 8 wide: tiles of 3, 3 and 2


def rounded(drawn):
    """Tokens, and the target, which is the gradient of the combined output, on the grid."""
    x, weights, experts, weight, target = drawn
    return ROWS.round(x), weights, experts, weight, ROWS.round(target)


def both_ways(make, run):
    """The layer with rows as they are, and with rows in FP8."""
    results = []
    for row_format in (None, ROWS):
        dispatcher = make()
        dispatcher.row_format = row_format
        results.append(run(dispatcher))
    return results


def _all_to_all(rank, cases):
    def run(case):
        drawn = rounded(_mine(rank, case))
        make = partial(AllToAllDispatcher, case.num_experts, dist.group.WORLD)
        return both_ways(make, lambda dispatcher: layer(dispatcher, case, *drawn))

    return [run(case) for case in cases]


def _node(rank, cases, per_node):
    ways = routes(rank, per_node)

    def run(case):
        drawn = rounded(_mine(rank, case))
        make = partial(NodeDispatcher, case.num_experts, ways)
        return both_ways(make, lambda dispatcher: layer(dispatcher, case, *drawn))

    return [run(case) for case in cases]


def _deepep(rank, version, tokens):
    deepep._install(version)
    buffers = DeepEPBuffers(dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    _, weights, experts, *_ = integers(sum(tokens), dtype=torch.bfloat16)
    shapes = (sum(tokens), 16), (8, 16, 16), (sum(tokens), 16)
    x, weight, target = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    drawn = rows_of(rank, tokens, rounded((x, weights, experts, weight, target)))
    return both_ways(partial(DeepEPDispatcher, 8, buffers), lambda dispatcher: linear_layer(dispatcher, *drawn))


def check_pairs(results):
    """One pair for each rank; gradients that nobody wants are None both ways."""
    for as_they_are, in_fp8 in results:
        for want, got in zip(as_they_are, in_fp8, strict=True):
            assert (want is None) == (got is None)
            assert want is None or (got.dtype == want.dtype and torch.equal(got, want))


@pytest.mark.parametrize("size", [2, 4])
def test_all_to_all_gives_the_same_bits(size):
    for case in run_ranks(size, _all_to_all, CASES[size]):
        check_pairs(case)


@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (2, 1), (4, 4), (4, 2), (4, 1)])
def test_dispatch_by_node_gives_the_same_bits(size, per_node):
    for case in run_ranks(size, _node, CASES[size], per_node):
        check_pairs(case)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tokens", [(6, 3), (0, 5), (4, 1, 0, 7)], ids=str)
def test_deepep_gives_the_same_bits(version, tokens):
    results = run_ranks(len(tokens), _deepep, version, tokens)
    check_pairs(results)
    assert any(in_fp8[0].any() and in_fp8[1].any() for _, in_fp8 in results)


def test_on_one_rank_nothing_travels():
    case = Case("definition", (9,))
    drawn = case.draw()  # not rounded, and nobody encodes it
    check_pairs([both_ways(partial(LocalDispatcher, 8), lambda dispatcher: layer(dispatcher, case, *drawn))])


def _promise_broken(rank):
    case = Case("uneven", (11, 2))
    drawn = _mine(rank, case)
    make = partial(AllToAllDispatcher, 8, dist.group.WORLD)
    return both_ways(make, lambda dispatcher: layer(dispatcher, case, *drawn))


def test_rows_beside_the_grid_would_not_arrive_as_they_are():
    """Or the tests above say nothing."""
    for as_they_are, in_fp8 in run_ranks(2, _promise_broken):
        assert not any(torch.equal(want, got) for want, got in zip(as_they_are, in_fp8, strict=True))
        for want, got in zip(as_they_are, in_fp8, strict=True):
            torch.testing.assert_close(got, want, rtol=0.2, atol=2.0)


def _bytes(rank, width, row_format):
    """Of each tensor that leaves: bytes of a row, in the order in which they are sent."""
    sent = []
    start = Crossing._start

    def counting(crossing, out, x):
        if x.dim() == 2:  # weights are not asked about
            sent.append(x.shape[1] * x.element_size())
        return start(crossing, out, x)

    Crossing._start = counting
    dispatcher = AllToAllDispatcher(4, dist.group.WORLD)
    dispatcher.row_format = row_format
    x = torch.ones(5, width, dtype=torch.bfloat16, requires_grad=True)
    x_RD, weights_R, routing = dispatcher.dispatch(x, torch.ones(5, 2), torch.arange(10).view(5, 2) % 4)
    dispatcher.combine(x_RD * weights_R[:, None].bfloat16(), routing).sum().backward()
    return sent


def test_tokens_and_their_gradients_take_half_the_bytes_and_sums_as_many_as_before():
    block = FP8Rows(Operand("e4m3", (1, 128), "power_of_two"))
    half = 300 + 3  # a byte for each value, and for each scale
    for in_fp8, as_they_are in zip(run_ranks(2, _bytes, 300, block), run_ranks(2, _bytes, 300, None), strict=True):
        assert in_fp8 == [half, 600, half, 600]  # dispatch, combine; and backward: combine, dispatch
        assert as_they_are == [600] * 4


def _traffic(rank, per_node, tokens):
    x, weights, experts, *_ = rows_of(rank, tokens, integers(sum(tokens)))
    dispatcher = NodeDispatcher(8, routes(rank, per_node))
    dispatcher.row_format = ROWS
    dispatcher.dispatch(x, weights, experts)
    return dispatcher.traffic


@pytest.mark.parametrize("per_node", [1, 2])
def test_traffic_counts_the_bytes_that_travel(per_node):
    _, _, experts, *_ = integers(sum(TOKENS))
    sender = [rank for rank, count in enumerate(TOKENS) for _ in range(count)]
    copy_bytes, row_bytes = 8 + 3 + 3 * (8 + 4), 8 + 3 + 8  # rows of 8 in tiles of 3
    want = [
        replace(
            each,
            bytes_across_nodes=each.across_nodes * copy_bytes,
            bytes_of_rows_across_nodes=each.rows_across_nodes * row_bytes,
        )
        for each in brute_force(experts, sender, per_node)
    ]
    assert run_ranks(4, _traffic, per_node, TOKENS) == want


def _odd_width(rank):
    deepep._install(2)
    dispatcher = DeepEPDispatcher(8, DeepEPBuffers(dist.group.WORLD))
    dispatcher.row_format = ROWS
    x, weights, experts, *_ = integers(3, dtype=torch.bfloat16)
    with pytest.raises(ConfigurationError, match=r"pieces of 16 bytes, and rows of this model have 8; use a hidden"):
        dispatcher.dispatch(x, weights, experts)
    assert "deep_ep" in sys.modules


def test_deepep_takes_fp8_rows_of_multiples_of_16():
    run_ranks(2, _odd_width)
