"""Gradients that are summed while a schedule runs are those that are summed after it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.early_sums import EarlySums, GradientSums
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from tests.ranks import run_ranks

STAGES = {"embedding": (0,), "tied": (0, 3), "head": (3,), "middle": (1,), "other": (2,)}
HOLDERS = {"embedding": (0, 3), "tied": (0, 3), "head": (0, 3), "middle": (1, 2), "other": (1, 2)}
HERE = {0: (0, 3), 1: (1, 2), 2: (2, 1), 3: (3, 0)}  # dualpipe over four ranks


def held(rank, dtype=torch.float64):
    return {name: nn.Parameter(torch.zeros(4, dtype=dtype)) for name, holders in HOLDERS.items() if rank in holders}


def _finished_in_any_order(rank, bucket_bytes):
    """Ranks finish their stages in different orders; mirrors must not wait for each other's."""
    named = held(rank)
    replicas = ReplicaGroups({name: HOLDERS[name] for name in named}, rank=rank, bucket_bytes=bucket_bytes)
    found = []
    for order in (1, -1):
        sums = EarlySums(replicas, named, STAGES, HERE[rank])
        for index, (name, parameter) in enumerate(named.items()):
            parameter.grad = torch.full((4,), 10.0**rank * (index + 1), dtype=torch.float64)
            if name == "middle" and rank == 1:
                parameter.grad = None
            if name == "other":
                parameter.grad = None
        for stage in HERE[rank][::order]:
            sums.stage_done(stage)
        absent = sums.wait()
        found.append({name: p.grad.unique().tolist() for name, p in named.items() if name not in absent})
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_sums_are_over_the_holders_whatever_stage_is_done_first(bucket_bytes):
    ends = {"embedding": [1001.0], "tied": [2002.0], "head": [3003.0]}
    middle = {"middle": [100.0]}  # rank 1 has none; of "other" nobody has one
    assert run_ranks(4, _finished_in_any_order, bucket_bytes) == [[ends] * 2, [middle] * 2, [middle] * 2, [ends] * 2]


def _order_of_sums(rank):
    """Of the names that travel, as each rank starts them."""
    named, started = held(rank), []
    replicas = ReplicaGroups({name: HOLDERS[name] for name in named}, rank=rank)
    sums = EarlySums(replicas, named, STAGES, HERE[rank])
    for stage in sorted(HERE[rank]):  # the other way round
        sums.stage_done(stage)
        started.append([name for name, parameter in named.items() if parameter.grad is not None])
    sums.wait()
    return started


def test_sums_start_with_the_last_stage_and_as_soon_as_it_is_done():
    ends, middle = run_ranks(4, _order_of_sums)[:2]
    assert ends == [[], ["embedding", "tied", "head"]]
    assert middle == [[], ["middle", "other"]]


class _Given(torch.autograd.Function):
    """A loss whose backward hands over the gradients of a step."""

    @staticmethod
    def forward(ctx, weight, step, factor):
        ctx.step, ctx.factor = step, factor
        return torch.zeros(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.step.take()["weight"] * ctx.factor, None, None


def _run(rank, script):
    """Calls of a training run; ``.grad`` after each backward."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    keep_main_gradients([weight])
    named = {"weight": weight}
    replicas = ReplicaGroups({"weight": (0, 1)}, rank=rank)
    sums = GradientSums(replicas, lambda: named, {"weight": (0,)}, here=(0,))
    steps, found = [], []
    for word in script.split():
        match word[0], word[1:]:
            case "F", size:  # forward: a schedule whose gradients have this size on rank 0
                step, before = sums.begin(), weight.grad
                weight.grad = torch.full((2,), float(size) * (rank + 1))
                step.stage_done(0)
                step.gradients = {"weight": weight.grad}
                weight.grad = before
                steps.append(step)
            case "B", factor:  # backward of all losses since the last one
                sum(_Given.apply(weight, step, float(factor)) for step in steps).backward()
                steps = []
                found.append(weight.grad[0].item())
            case "(" | ")", _:
                sums.blocked = word == "("
            case "0", _:
                weight.grad = None
    return found


SCRIPTS = {  # what .grad must be after each backward; None: it is not summed yet
    "steps": ("F1 B1 0 F2 B0.5", [3.0, 3.0]),
    "two losses, one backward": ("F1 F10 B1", [33.0]),
    "two backwards": ("F1 B1 F10 B0.5", [3.0, 18.0]),
    "accumulation": ("( F1 B1 F10 B1 ) F100 B1 0 F1 B1", [None, None, 333.0, 3.0]),
    "a sum that is added while sums are blocked": ("F1 ( B1 ) F10 B1", [None, 33.0]),
    "blocked backwards on top of a sum": ("F1 B1 ( F10 B1 ) F100 B1", [3.0, None, 333.0]),
    "blocked, then thrown away": ("( F1 B1 ) 0 F10 B1 0 F1 B1", [None, 30.0, 3.0]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gradient_is_summed_once_however_losses_and_backwards_follow_each_other(script):
    steps, expected = SCRIPTS[script]
    for found in run_ranks(2, _run, steps):
        assert [value if want is not None else None for value, want in zip(found, expected, strict=True)] == expected


def _takes_turns(rank):
    """Two optimizers, each with the other's parameter frozen; two batches are accumulated."""
    named = {name: nn.Parameter(torch.zeros(2)) for name in "ab"}
    replicas = ReplicaGroups(dict.fromkeys("ab", (0, 1)), rank=rank)
    sums = GradientSums(replicas, lambda: named, dict.fromkeys("ab", (0,)), here=(0,))
    for size, blocked in ((1.0, True), (10.0, False)):
        for mine in "ab":
            for name, parameter in named.items():
                parameter.requires_grad_(name == mine)
            sums.blocked = blocked
            step, before = sums.begin(), named[mine].grad
            named[mine].grad = torch.full((2,), size * (rank + 1))
            step.stage_done(0)
            step.gradients, named[mine].grad = {"weight": named[mine].grad}, before
            _Given.apply(named[mine], step, 1.0).backward()
            sums.blocked = False
    return {name: parameter.grad[0].item() for name, parameter in named.items()}


def test_what_is_frozen_when_sums_are_due_is_summed_all_the_same():
    assert run_ranks(2, _takes_turns) == [{"a": 33.0, "b": 33.0}] * 2


def test_gradients_of_one_rank_are_left_alone():
    weight = nn.Parameter(torch.zeros(2))
    sums = GradientSums(
        ReplicaGroups({"weight": (0,)}, rank=0), lambda: {"weight": weight}, {"weight": (0,)}, here=(0,)
    )
    step = sums.begin()
    step.stage_done(0)
    step.gradients = {"weight": torch.ones(2)}
    _Given.apply(weight, step, 2.0).backward()
    assert weight.grad.tolist() == [2.0, 2.0]
    assert step.take() is None, "handed over once"


def _sparse(rank):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    sums = EarlySums(ReplicaGroups({"table": (0, 1)}, rank=rank), {"table": table.weight}, {"table": (0,)}, (0,))
    try:
        sums.stage_done(0)
    except ConfigurationError as error:
        assert dist.get_world_size() == 2
        return str(error)


def test_sparse_gradients_are_refused_by_name():
    for message in run_ranks(2, _sparse):
        assert "table is sparse; set sparse=False" in message
