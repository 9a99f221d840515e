"""What differs on a GPU: kernels, asynchronous execution, autocast of another device."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.parallel.dispatch import LocalDispatcher
from lightning_dualpipe.parallel.grad_norm import clip_
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from lightning_dualpipe.precision.grouped_linear import _Loop, grouped_linear
from lightning_dualpipe.precision.linear import linear
from tests.marks import needs_cuda

pytestmark = needs_cuda
COUNTS = [[64, 0, 1, 191], [0, 0, 256, 0], [3, 7, 0, 0], [0, 0, 0, 0]]


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deferring", [False, True])
@pytest.mark.parametrize(("dtype", "amp"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)])
def test_linear_has_the_bits_of_torch(dtype, amp, deferring):
    layer = torch.nn.Linear(64, 32, device="cuda", dtype=dtype)
    x, grad = torch.randn(3, 40, 64, device="cuda", dtype=dtype), torch.randn(3, 40, 32, device="cuda")
    queue, found = WeightGradients(), []
    queue.deferring = deferring
    for function in (F.linear, lambda *tensors: linear(*tensors, queue)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = function(leaf, layer.weight, layer.bias)
        y.backward(grad.to(y.dtype))
        queue.run(len(queue))
        found.append((y, leaf.grad, layer.weight.grad, layer.bias.grad))
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_kernel_agrees_with_the_loop(counts):
    """2e-2: both round to bfloat16, after adding in different orders."""
    rows = sum(counts)
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
    garbage = torch.full_like(weight, float("nan"))  # memory that the gradient is likely to get
    del garbage
    y = grouped_linear(x, weight, torch.tensor(counts, device="cuda"))
    y.backward(grad)
    ends = [sum(counts[:index]) for index in range(5)]
    loop = _Loop(tuple(ends))
    with torch.no_grad():
        want = loop.rows_times(x, weight.mT), loop.rows_times(grad, weight), loop.products(grad, x)
    for got, expected in zip((y, x.grad, weight.grad), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-1)
    assert not weight.grad[[count == 0 for count in counts]].any()


def test_a_layer_of_local_experts_never_waits_for_the_device():
    dispatcher, queue = LocalDispatcher(4), WeightGradients()
    queue.deferring = True
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    x, weights = torch.randn(32, 64, **options), torch.rand(32, 2, **options)
    experts = torch.rand(32, 4, device="cuda").topk(2).indices
    parameter = torch.nn.Parameter(torch.randn(4, 64, 64, device="cuda", dtype=torch.bfloat16))
    replicas = ReplicaGroups({"experts": (0,)}, rank=0)

    def step():
        x_RD, weights_R, routing = dispatcher.dispatch(x, weights, experts)
        y_RD = grouped_linear(x_RD, parameter, routing.counts_E, queue) * weights_R[:, None]
        dispatcher.combine(y_RD, routing).sum().backward()
        queue.run(len(queue))
        return clip_({"experts": parameter}, 1.0, replicas, group=None)

    step()  # libraries set themselves up
    with no_synchronisation():
        norm = step()
    assert norm > 0
