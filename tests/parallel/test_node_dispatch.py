"""Deduplicated dispatch: the sums of one rank up to the order of additions, everything else in the same bits."""

import time

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.parallel.dispatch import LocalDispatcher
from lightning_dualpipe.parallel.groups import Groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.parallel.node_dispatch import NodeDispatcher, NodeRoutes
from lightning_dualpipe.parallel.relay import Relay
from lightning_dualpipe.parallel.traffic import Traffic
from lightning_dualpipe.precision.grouped_linear import grouped_linear
from tests.parallel.test_dispatch import CASES, _mine, layer
from tests.ranks import run_ranks

PLACEMENTS = [(2, 2), (2, 1), (4, 4), (4, 2), (4, 1)]  # ranks, of which so many on each node
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def routes(rank, per_node):
    size = dist.get_world_size()
    groups = Groups.create(ParallelLayout(size, expert=size, per_node=per_node), rank)
    return NodeRoutes(groups.expert, groups.expert_across, groups.expert_within)


def integers(num_tokens, *, num_experts=8, top_k=3, dtype=torch.float64):
    """Small enough for every sum to be exact in ``dtype``."""
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator).to(dtype)

    experts = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    weight = torch.diag_embed(draw(num_experts, 8))
    weights = draw(num_tokens, top_k).to(torch.promote_types(dtype, torch.float32))
    return draw(num_tokens, 8), weights, experts, weight, draw(num_tokens, 8)


def rows_of(rank, tokens, drawn):
    x, weights, experts, weight, target = drawn
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    return x[mine], weights[mine], experts[mine], weight, target[mine]


def linear_layer(dispatcher, x, weights, experts, weight, target):
    local = slice(dispatcher.first_local_expert, dispatcher.first_local_expert + dispatcher.num_local_experts)
    x, weights, weight = (tensor.clone().requires_grad_() for tensor in (x, weights, weight[local]))
    x_RD, weights_R, routing = dispatcher.dispatch(x, weights, experts)
    rows = grouped_linear(x_RD, weight, routing.counts_E) * weights_R.to(x.dtype)[:, None]
    y = dispatcher.combine(rows, routing)
    (y * target).sum().backward()
    return y.detach(), x.grad, weights.grad, weight.grad


def _on_rank(rank, cases, per_node):
    ways = routes(rank, per_node)
    return [layer(NodeDispatcher(case.num_experts, ways), case, *_mine(rank, case)) for case in cases]


@pytest.fixture(scope="module")
def everywhere():
    return {
        (size, per_node): list(zip(*run_ranks(size, _on_rank, CASES[size], per_node), strict=True))
        for size, per_node in PLACEMENTS
    }


@pytest.mark.parametrize(
    ("size", "per_node", "index"),
    [
        pytest.param(size, per_node, index, id=f"{size} ranks, {per_node} on a node: {case.name}")
        for size, per_node in PLACEMENTS
        for index, case in enumerate(CASES[size])
    ],
)
def test_sums_are_those_of_one_rank_and_gradients_of_weights_its_bits(everywhere, size, per_node, index):
    """An expert meets the rows of one rank in their order; only the rows of a token are summed in another one."""
    case = CASES[size][index]
    want = layer(LocalDispatcher(case.num_experts), case, *case.draw())
    got = zip(*everywhere[size, per_node][index], strict=True)
    for name, parts, whole in zip(("y", "x", "weights", "experts"), got, want, strict=True):
        if whole is None:
            assert all(part is None for part in parts), name
        elif name in ("weights", "experts"):
            assert torch.equal(torch.cat(parts), whole), name
        elif case.dtype == torch.bfloat16:  # partial sums are rounded where they cross: twice at most
            torch.testing.assert_close(torch.cat(parts), whole, rtol=2**-6, atol=2**-5, msg=name)
        else:
            tolerance = TOLERANCE[case.dtype]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=tolerance, atol=tolerance, msg=name)


TOKENS = (5, 0, 9, 2)


def _exact(rank, per_node):
    given = rows_of(rank, TOKENS, integers(sum(TOKENS)))
    return linear_layer(NodeDispatcher(8, routes(rank, per_node)), *given)


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_of_integers_all_bits_are_those_of_one_rank(per_node):
    want = linear_layer(LocalDispatcher(8), *integers(sum(TOKENS)))
    for got, expected in zip(zip(*run_ranks(4, _exact, per_node), strict=True), want, strict=True):
        assert torch.equal(torch.cat(got), expected)


def _sum_of_small_ones(rank):
    """One token of rank 0 for all four experts of rank 1, on another node."""
    dispatcher, tokens = NodeDispatcher(8, routes(rank, 1)), 1 - rank
    ones = torch.ones(tokens, 8, dtype=torch.bfloat16)
    experts = torch.arange(4, 8).expand(tokens, 4)
    _, _, routing = dispatcher.dispatch(ones, torch.ones(tokens, 4), experts)
    rows = torch.tensor([256.0, 1, 1, 2])[: 4 * rank, None].expand(-1, 8).bfloat16()
    return dispatcher.combine(rows.requires_grad_(), routing).tolist()


def test_half_types_are_added_up_in_float32():
    assert run_ranks(2, _sum_of_small_ones)[0] == [[260.0] * 8]  # in bfloat16: 256 + 1 + 1 + 2 = 258


def _traffic(rank, per_node, tokens):
    x, weights, experts, *_ = rows_of(rank, tokens, integers(sum(tokens)))
    dispatcher = NodeDispatcher(8, routes(rank, per_node))
    for _ in range(2):
        dispatcher.dispatch(x, weights, experts)
    return dispatcher.traffic


def brute_force(experts, sender, per_node):
    """Each token's way, copy by copy; a copy that is passed on is counted where it is passed on."""
    across, within, rows_across, rows_within = [0] * 4, [0] * 4, [0] * 4, [0] * 4
    node_of = [rank // per_node for rank in range(4)]
    for rank, chosen in zip(sender, experts.tolist(), strict=True):
        wanted = [expert // 2 for expert in chosen]
        rows_across[rank] += sum(node_of[peer] != node_of[rank] for peer in wanted)
        rows_within[rank] += sum(node_of[peer] == node_of[rank] and peer != rank for peer in wanted)
        for node in {node_of[peer] for peer in wanted}:
            at = node * per_node + rank % per_node
            across[rank] += node != node_of[rank]
            within[at] += len({peer for peer in wanted if node_of[peer] == node} - {at})
    copy_bytes, row_bytes = 8 * 8 + 3 * (8 + 4), 8 * 8 + 8
    return [
        Traffic(*counts, counts[0] * copy_bytes, counts[2] * row_bytes)
        for counts in zip(across, within, rows_across, rows_within, strict=True)
    ]


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_traffic_is_what_a_count_of_each_copy_gives(per_node):
    tokens = (5, 0, 40, 11)
    _, _, experts, *_ = integers(sum(tokens))
    sender = [rank for rank, count in enumerate(tokens) for _ in range(count)]
    once = brute_force(experts, sender, per_node)
    assert run_ranks(4, _traffic, per_node, tokens) == [each + each for each in once]
    if per_node < 4:
        assert sum(each.across_nodes for each in once) < sum(each.rows_across_nodes for each in once)


def _second_hops_arrive(rank):
    """Nobody lands anything, and yet the last hops of all journeys are launched, in one order on all ranks."""
    ways = routes(rank, 2)
    dispatchers = [NodeDispatcher(8, ways) for _ in range(3)]
    x, weights, experts, *_ = rows_of(rank, TOKENS, integers(sum(TOKENS)))
    flights = [each.send(*each.pack(x + layer, weights, experts)) for layer, each in enumerate(dispatchers)]
    last = ways.relay._last
    deadline = time.monotonic() + 20
    while not last.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert last.done(), "the second hop waits for somebody to land"
    landed = [flight.land()[0] for flight in reversed(flights)]
    return all(torch.equal(landed[2] + layer, landed[2 - layer]) for layer in range(3))


def test_the_second_hop_starts_while_the_host_does_something_else():
    assert run_ranks(4, _second_hops_arrive) == [True] * 4


def test_what_fails_on_the_way_is_raised_where_it_is_waited_for_and_stops_those_behind():
    relay, order = Relay(), []

    def fails():
        time.sleep(0.05)
        order.append("first")
        raise RuntimeError("a peer is gone")

    first, second = relay.start(fails), relay.start(lambda: order.append("second"))
    for journey in (first, second):
        with pytest.raises(RuntimeError, match="a peer is gone"):
            journey.result(timeout=10)
    assert order == ["first"]
