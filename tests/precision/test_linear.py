import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm
from torch.utils.checkpoint import checkpoint

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.linear import linear, make_linears_deferrable

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def run(function, layer, x, grad, *, amp=None):
    """Output, and gradients of input, weight and bias."""
    layer.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        y = function(x, layer.weight, layer.bias)
    y.backward(grad.to(y.dtype))
    return y, x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


def deferred(x, weight, bias):
    """Put off during backward, computed by a hook at its end: looks like F.linear from outside."""
    queue = WeightGradients()
    queue.deferring = True
    y = linear(x, weight, bias, queue)

    def compute(_):
        torch.autograd.Variable._execution_engine.queue_callback(lambda: queue.run(len(queue)))

    y.register_hook(compute)
    return y


def now(x, weight, bias):
    return linear(x, weight, bias, WeightGradients())


@pytest.mark.parametrize("function", [now, deferred])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_that_of_torch(function, shape, bias, dtype):
    layer = nn.Linear(7, 4, bias=bias, dtype=dtype)
    x, grad = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(*shape[:-1], 4, dtype=dtype)
    assert_same(run(function, layer, x, grad), run(F.linear, layer, x, grad))


@pytest.mark.parametrize("function", [now, deferred])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_the_bits_and_dtypes_of_torch(function, amp, dtype):
    layer = nn.Linear(7, 4, dtype=dtype)
    x, grad = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True), torch.randn(3, 5, 4)
    assert_same(run(function, layer, x, grad, amp=amp), run(F.linear, layer, x, grad, amp=amp))


def assert_same(ours, torchs):
    for mine, theirs in zip(ours, torchs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
            assert mine.grad_fn is not None or not mine.requires_grad


def test_backward_under_autocast_keeps_the_format_of_its_forward():
    layer, queue = nn.Linear(7, 4), WeightGradients()
    x, grad = torch.randn(5, 7, requires_grad=True), torch.randn(5, 4)
    want = run(F.linear, layer, x, grad)
    for queue.deferring in (False, True):
        layer.zero_grad()
        x.grad = None
        y = linear(x, layer.weight, layer.bias, queue)
        with torch.autocast("cpu", torch.bfloat16):
            y.backward(grad)
            queue.run(len(queue))
        assert_same((y, x.grad, layer.weight.grad, layer.bias.grad), want)


def test_deferred_gradients_arrive_when_asked_oldest_first_and_carry_no_graph():
    layer, queue = nn.Linear(2, 2, bias=False), WeightGradients()
    queue.deferring = True
    xs = [torch.full((1, 2), value, requires_grad=True) for value in (1.0, 10.0)]
    for x in xs:
        linear(x, layer.weight, None, queue).sum().backward()
    assert len(queue) == 2 and layer.weight.grad is None and all(x.grad is not None for x in xs)
    queue.run(1)
    assert torch.equal(layer.weight.grad, torch.ones(2, 2)) and not layer.weight.grad.requires_grad
    queue.run(1)
    assert torch.equal(layer.weight.grad, torch.full((2, 2), 11.0)) and layer.weight.grad.grad_fn is None


def test_an_input_without_gradient_still_leaves_its_weight_gradient():
    """The first stage of a pipeline."""
    layer, queue = nn.Linear(3, 2), WeightGradients()
    queue.deferring = True
    linear(torch.ones(4, 3), layer.weight, layer.bias, queue).sum().backward()
    queue.run(2)
    assert torch.equal(layer.weight.grad, torch.full((2, 3), 4.0))
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0))


@pytest.mark.parametrize(("frozen", "waiting"), [("weight", 1), ("bias", 1), ("both", 0)])
def test_frozen_parameters_get_nothing_and_queue_nothing(frozen, waiting):
    layer, queue = nn.Linear(3, 2), WeightGradients()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, "both"))
    queue.deferring = True
    x = torch.ones(4, 3, requires_grad=True)
    linear(x, layer.weight, layer.bias, queue).sum().backward()
    assert len(queue) == waiting and x.grad is not None
    queue.run(waiting)
    assert [p.grad is not None for p in layer.parameters()] == [p.requires_grad for p in layer.parameters()]


def test_a_hook_of_a_parameter_still_sees_its_gradient():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        layer, queue, seen = nn.Linear(3, 2, bias=False), WeightGradients(), []
        queue.deferring = True
        getattr(layer.weight, register)(lambda tensor, seen=seen: seen.append(tensor.shape))
        linear(torch.ones(4, 3), layer.weight, None, queue).sum().backward()
        assert len(queue) == 0 and seen == [(2, 3)]


def test_a_computed_weight_passes_its_gradient_on():
    base, queue = torch.ones(2, 3, requires_grad=True), WeightGradients()
    queue.deferring = True
    linear(torch.ones(4, 3), 2 * base, None, queue).sum().backward()
    assert torch.equal(base.grad, torch.full((2, 3), 8.0))


@pytest.mark.parametrize("context", [torch.autograd.graph.save_on_cpu, None], ids=["save_on_cpu", "checkpoint"])
def test_gradients_reach_the_parameter_when_saved_tensors_are_replaced(context):
    layer, queue = nn.Linear(3, 2), WeightGradients()
    queue.deferring = True
    x = torch.randn(4, 3, requires_grad=True)
    if context is None:
        y = checkpoint(lambda x: linear(x, layer.weight, layer.bias, queue), x, use_reentrant=False)
    else:
        with context():
            y = linear(x, layer.weight, layer.bias, queue)
    y.sum().backward()
    queue.run(len(queue))
    assert torch.allclose(layer.weight.grad, x.detach().sum(0).expand(2, 3))


def test_no_graph_is_kept_where_gradients_are_off():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        assert linear(torch.ones(4, 3), layer.weight, layer.bias, WeightGradients()).grad_fn is None


# ---- make_linears_deferrable ------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Waits(nn.Module):
    weight_gradients = None

    def forward(self, x):
        assert self.weight_gradients is not None
        return x


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def odd_linears():
    """Layers that are nn.Linear, or nearly, and must be left alone."""
    pruned, replaced, parametrized = (nn.Linear(4, 4) for _ in range(3))
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    normed = spectral_norm(nn.Linear(4, 4))
    replaced.forward = lambda x: x
    parametrize.register_parametrization(parametrized, "weight", Doubled())
    return nn.Sequential(Scaled(4, 4), pruned, normed, replaced, parametrized).double().eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Sequential(nn.Linear(6, 4, bias=False)), Waits()).double()


def gradients(model, x, queue=None):
    model.zero_grad()
    model(x).square().sum().backward()
    if queue is not None:
        queue.run(len(queue))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_module_looks_and_computes_the_same_and_its_gradients_wait(model):
    model[3].weight_gradients = WeightGradients()
    x = torch.randn(5, 4, dtype=torch.float64)
    keys, want = list(model.state_dict()), gradients(model, x)
    queue = WeightGradients()
    undo = make_linears_deferrable(model, queue)
    queue.deferring = True
    got = gradients(model, x, queue)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert list(model.state_dict()) == keys and type(model[0]) is nn.Linear and model[3].weight_gradients is queue

    undo()
    assert "forward" not in vars(model[0]) and model[3].weight_gradients is not queue
    assert all(torch.equal(gradient, want[name]) for name, gradient in gradients(model, x).items())
    assert len(queue) == 0


def test_linears_with_a_will_of_their_own_are_left_alone():
    model, queue = odd_linears(), WeightGradients()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    want = gradients(model, x)
    make_linears_deferrable(model, queue)
    queue.deferring = True
    model.zero_grad()
    model(x).square().sum().backward()
    assert len(queue) == 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (want[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, want[name]), name


def test_module_hooks_run_as_before(model):
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model[0].register_forward_hook(lambda module, args, output: seen.append("forward"))
    model[0].register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    queue = WeightGradients()
    make_linears_deferrable(model, queue)
    queue.deferring = True
    model(torch.randn(5, 4, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"] and len(queue) == 3


def test_copies_of_a_module_use_their_own_parameters(model):
    queue = WeightGradients()
    make_linears_deferrable(model, queue)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
        assert clone[0].weight.grad is not None and model[0].weight.grad is None and len(queue) == 0


def test_making_it_deferrable_twice_changes_nothing_more(model):
    queue, other = WeightGradients(), WeightGradients()
    make_linears_deferrable(model, queue)
    make_linears_deferrable(model[0], other)()
    queue.deferring = True
    model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert len(queue) == 3
