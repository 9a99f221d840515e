from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.dispatch import AllToAllDispatcher, LocalDispatcher
from lightning_dualpipe.precision.grouped_linear import grouped_linear
from tests.ranks import run_ranks

WIDTH = 8  # rows start at multiples of 64 bytes, so that a product has the same bits wherever its rows lie


@dataclass(frozen=True)
class Case:
    """Tokens on each rank of a group; which experts they choose; what needs a gradient."""

    name: str
    tokens: tuple[int, ...]
    num_experts: int = 8
    top_k: int = 3
    chosen: str = "random"
    dtype: torch.dtype = torch.float64
    frozen: tuple[str, ...] = ()

    def draw(self):
        generator = torch.Generator().manual_seed(len(self.name))

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        num_tokens = sum(self.tokens)
        scores = torch.rand(num_tokens, self.num_experts, generator=generator)
        if self.chosen == "first":  # everybody wants the same experts: other ranks starve
            scores = torch.arange(self.num_experts, 0, -1.0).expand(num_tokens, -1)
        elif self.chosen == "one each":  # as even as can be
            scores = torch.eye(self.num_experts).repeat(num_tokens, 1)[:num_tokens]
        experts = scores.topk(self.top_k).indices
        weight = normal(self.num_experts, WIDTH, WIDTH)
        return normal(num_tokens, WIDTH), normal(num_tokens, self.top_k), experts, weight, normal(num_tokens, WIDTH)


def layer(dispatcher, case, x, weights, experts, weight, target):
    """A layer of linear experts, and the gradients of a loss that is a sum over tokens."""
    local = slice(dispatcher.first_local_expert, dispatcher.first_local_expert + dispatcher.num_local_experts)
    x, weights, weight = x.clone(), weights.clone(), weight[local].clone()
    for name, tensor in (("x", x), ("weights", weights), ("experts", weight)):
        tensor.requires_grad_(name not in case.frozen)
    x_RD, weights_R, routing = dispatcher.dispatch(x, weights, experts)
    assert int(routing.counts_E.sum()) == len(x_RD) == len(weights_R)
    y = dispatcher.combine(grouped_linear(x_RD, weight, routing.counts_E).tanh() * weights_R[:, None], routing)
    if y.requires_grad:
        (y * target).sum().backward()
    return y.detach(), x.grad, weights.grad, weight.grad


def mean_over_experts(x, weights, experts, weight):
    """The definition, token by token."""
    rows = []
    for x_D, weights_K, experts_K in zip(x, weights, experts, strict=True):
        rows.append(sum(w * (weight[e] @ x_D).tanh() for w, e in zip(weights_K, experts_K, strict=True)))
    return torch.stack(rows)


def _on_rank(rank, cases):
    return [layer(AllToAllDispatcher(case.num_experts, dist.group.WORLD), case, *_mine(rank, case)) for case in cases]


def _mine(rank, case):
    x, weights, experts, weight, target = case.draw()
    start = sum(case.tokens[:rank])
    mine = slice(start, start + case.tokens[rank])
    return x[mine], weights[mine], experts[mine], weight, target[mine]


CASES = {
    2: [
        Case("even", (6, 6)),
        Case("uneven", (11, 2)),
        Case("a rank without tokens", (0, 5)),
        Case("no tokens at all", (0, 0)),
        Case("all to the first rank", (4, 5), chosen="first"),
        Case("one expert per token", (3, 4), top_k=1),
        Case("every expert", (2, 3), top_k=8),
        Case("one expert per rank", (5, 4), num_experts=2, top_k=1),
        Case("inputs need no gradient", (3, 0), frozen=("x",)),
        Case("nothing but inputs needs a gradient", (0, 3), frozen=("weights", "experts")),
        Case("only experts need a gradient", (0, 3), frozen=("weights", "x")),
        Case("nothing needs a gradient", (2, 3), frozen=("weights", "x", "experts")),
        Case("float32", (6, 3), dtype=torch.float32),
        Case("bfloat16", (6, 3), dtype=torch.bfloat16),
    ],
    4: [
        Case("uneven", (7, 0, 3, 1)),
        Case("all to the first rank", (2, 3, 0, 4), top_k=2, chosen="first"),
        Case("one token", (0, 0, 1, 0)),
        Case("one each", (8, 8, 8, 8), top_k=1, chosen="one each"),
        Case("bfloat16", (5, 0, 2, 2), dtype=torch.bfloat16),
    ],
}


@pytest.fixture(scope="module")
def across():
    """Every case on its ranks, computed once per world size."""
    return {size: list(zip(*run_ranks(size, _on_rank, cases), strict=True)) for size, cases in CASES.items()}


@pytest.mark.parametrize(
    ("size", "index"),
    [pytest.param(s, i, id=f"{s} ranks: {case.name}") for s, cases in CASES.items() for i, case in enumerate(cases)],
)
def test_all_to_all_gives_the_bits_of_one_rank_with_all_tokens(across, size, index):
    """Also the experts' gradients: an expert meets its rows in the order of (rank, token), as one rank would."""
    case = CASES[size][index]
    want = layer(LocalDispatcher(case.num_experts), case, *case.draw())
    for name, mine, whole in zip(
        ("y", "x", "weights", "experts"), zip(*across[size][index], strict=True), want, strict=True
    ):
        if whole is None:
            assert all(part is None for part in mine), name
        else:
            got = torch.cat(mine)
            assert got.dtype == whole.dtype and torch.equal(got, whole), name


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_the_local_layer_is_the_weighted_sum_over_chosen_experts(top_k):
    x, weights, experts, weight, target = Case("definition", (9,), top_k=top_k).draw()
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weights, weight)]
    want = mean_over_experts(inputs[0], inputs[1], experts, inputs[2])
    (want * target).sum().backward()
    y, *grads = layer(LocalDispatcher(8), Case("definition", (9,)), x, weights, experts, weight, target)
    for got, expected in zip([y, *grads], [want, *(each.grad for each in inputs)], strict=True):
        # a matrix product of many rows adds in another order than that of one
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-12)


def test_rows_are_sorted_by_expert_and_then_by_token():
    experts = torch.tensor([[2, 0], [0, 1], [2, 1]])
    x = torch.tensor([[10.0], [11.0], [12.0]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    x_RD, weights_R, routing = LocalDispatcher(4).dispatch(x, weights, experts)
    assert x_RD.flatten().tolist() == [10, 11, 11, 12, 10, 12]
    assert weights_R.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.6, 0.1, 0.5])
    assert routing.counts_E.tolist() == [2, 2, 2, 0]


def test_the_sum_over_experts_does_not_depend_on_how_many_tokens_there_are():
    """Else a layout that splits the batch would change results."""
    x, weights, experts, *_ = Case("many", (100,), dtype=torch.float32, top_k=8).draw()

    def combined(tokens):
        dispatcher = LocalDispatcher(8)
        x_RD, weights_R, routing = dispatcher.dispatch(x[tokens], weights[tokens], experts[tokens])
        return dispatcher.combine(x_RD * weights_R[:, None], routing)

    whole = combined(slice(None))
    assert torch.equal(whole, torch.cat([combined(slice(start, start + 7)) for start in range(0, 100, 7)]))


def test_half_types_are_added_up_in_float32():
    dispatcher, ones = LocalDispatcher(2), torch.ones(1, 2, dtype=torch.bfloat16)
    _, _, routing = dispatcher.dispatch(ones, ones, torch.tensor([[0, 1]]))
    big_and_small = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    assert dispatcher.combine(big_and_small, routing).item() == 256.0  # 257, rounded once
    more = LocalDispatcher(3)
    _, _, routing = more.dispatch(ones[:, :1], torch.ones(1, 3, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]]))
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert more.combine(rows, routing).item() == 258.0  # adding in bfloat16 would stay at 256


def _asks_for_too_many(rank):
    with pytest.raises(ConfigurationError, match="7 experts cannot be spread evenly over 2 ranks"):
        AllToAllDispatcher(7, dist.group.WORLD)


def test_experts_must_divide_the_ranks():
    run_ranks(2, _asks_for_too_many)


def _disagrees(rank):
    """Rank 0 brings fresh tokens that require no gradient, rank 1 tokens that do."""
    dispatcher = AllToAllDispatcher(2, dist.group.WORLD)
    x = torch.ones(rank, 4, requires_grad=rank == 1)
    x_RD, weights_R, routing = dispatcher.dispatch(x, torch.ones(rank, 1), torch.zeros(rank, 1, dtype=torch.int64))
    y = dispatcher.combine(2 * x_RD * weights_R[:, None], routing)
    assert y.requires_grad
    y.sum().backward()
    return x.grad


def test_a_rank_that_needs_no_gradient_helps_those_that_do():
    without, with_gradient = run_ranks(2, _disagrees, timeout=30)
    assert without is None and torch.equal(with_gradient, torch.full((1, 4), 2.0))


def _drops_the_graph(rank):
    dispatcher = AllToAllDispatcher(2, dist.group.WORLD)
    x = torch.ones(1, 4, requires_grad=True)
    _, _, routing = dispatcher.dispatch(x, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    if rank == 1:
        with pytest.raises(AssertionError, match="must keep their output in the graph"):
            dispatcher.combine(torch.empty(0, 4), routing)


def test_experts_that_drop_the_graph_are_an_error_and_no_hang():
    run_ranks(2, _drops_the_graph, timeout=30)
