import math

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.parallel.grad_norm import clip_, gradient_norm
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from tests.ranks import run_ranks

HOLDERS = {"dense": (0, 1, 2, 3), "left": (0, 1), "right": (2, 3), "expert0": (0, 2), "expert1": (1, 3), "last": (3,)}
NORMS = [2.0, 1.0, 3.5, math.inf]
MAX_NORM = 0.5


def whole_model(dtype):
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for size, name in enumerate(HOLDERS, start=3):
        parameters[name] = torch.nn.Parameter(torch.zeros(size, 50, dtype=dtype))
        parameters[name].grad = torch.randn(size, 50, generator=generator).to(dtype)
    parameters["last"].grad = None
    return parameters


def _on_rank(rank, dtype):
    """The gradients are those after summing: equal on all holders."""
    results = []
    for norm_type in NORMS:
        parameters = {name: each for name, each in whole_model(dtype).items() if rank in HOLDERS[name]}
        replicas = ReplicaGroups({name: HOLDERS[name] for name in parameters}, rank=rank)
        norm = clip_(parameters, MAX_NORM, replicas, group=dist.group.WORLD, norm_type=norm_type)
        results.append((norm, {name: each.grad for name, each in parameters.items()}))
    return results


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-6),
        (torch.bfloat16, 1e-2),  # torch rounds the norm, and so the coefficient, to bfloat16
    ],
)
def test_norm_and_clipped_gradients_are_those_of_one_process(dtype, tolerance):
    found = run_ranks(4, _on_rank, dtype)
    for index, norm_type in enumerate(NORMS):
        parameters = whole_model(dtype)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM, norm_type)
        for rank in range(4):
            got, gradients = found[rank][index]
            assert torch.equal(got, found[0][index][0])  # else ranks would scale by different numbers
            torch.testing.assert_close(got, norm.double(), rtol=tolerance, atol=0)
            for name, gradient in gradients.items():
                assert (gradient is None) == (parameters[name].grad is None)
                if gradient is not None:
                    torch.testing.assert_close(gradient, parameters[name].grad, rtol=tolerance, atol=1e-12)


def test_half_gradients_are_accumulated_in_float32():
    weight = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1.0)
    replicas = ReplicaGroups({"weight": (0,)}, rank=0)
    assert gradient_norm({"weight": weight}, replicas, group=None).item() == 100.0


def test_small_gradients_are_left_alone_and_no_gradients_have_norm_zero():
    weight = torch.nn.Parameter(torch.zeros(4))
    replicas = ReplicaGroups({"weight": (0,)}, rank=0)
    assert clip_({"weight": weight}, 1.0, replicas, group=None) == 0 and weight.grad is None
    weight.grad = torch.full((4,), 0.25)
    assert clip_({"weight": weight}, 1.0, replicas, group=None) == 0.5
    assert torch.equal(weight.grad, torch.full((4,), 0.25))
    assert gradient_norm({}, replicas, group=None) == 0


def _nothing_on_one(rank):
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    parameters = {"weight": weight} if rank == 0 else {}
    replicas = ReplicaGroups(dict.fromkeys(parameters, (0,)), rank=rank)
    return gradient_norm(parameters, replicas, group=dist.group.WORLD).item()


def test_a_rank_without_parameters_takes_part():
    assert run_ranks(2, _nothing_on_one) == [6.0, 6.0]
