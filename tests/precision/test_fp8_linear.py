"""Layers in FP8 against the products of ``reference``, bit for bit: now, later, and after a weight has changed."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision import fp8_linear, fp8_weight, reference
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.linear import take_over
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from lightning_dualpipe.precision.recipe import MXFP8, Block, Current, Recipe

RECIPES = [Block(), Block("float32"), Current(), MXFP8()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ROWS, INPUTS, OUTPUTS = 37, 144, 160  # more than a tile, and no multiple of one


def layer_of(
    recipe: Recipe, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, EmulateBackend]:
    torch.manual_seed(0)
    layer, backend = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype), EmulateBackend(recipe)
    take_over(layer, backend.linear())
    return layer, backend


def waiting(layer: nn.Linear) -> WeightGradients:
    queue = WeightGradients()
    queue.deferring = True
    vars(layer)["weight_gradients"] = queue
    return queue


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_bit_is_that_of_the_definition(recipe, dtype, bias, later):
    layer, _ = layer_of(recipe, bias=bias, dtype=dtype)
    queue = waiting(layer) if later else WeightGradients()
    microbatches = [
        (torch.randn(2, ROWS, INPUTS, dtype=dtype, requires_grad=True), torch.randn(2, ROWS, OUTPUTS, dtype=dtype))
        for _ in range(2)
    ]
    weight, sums = layer.weight.detach(), {}
    for x, grad in microbatches:
        y = layer(x)
        y.backward(grad)
        rows, grad_rows = x.detach().flatten(0, 1), grad.flatten(0, 1)
        expected = reference.forward(rows, weight, recipe)
        assert torch.equal(y.flatten(0, 1), expected + layer.bias if bias else expected)
        assert torch.equal(x.grad.flatten(0, 1), reference.grad_input(grad_rows, weight, recipe))
        parts = {"weight": reference.grad_weight(grad_rows, rows, recipe), "bias": grad_rows.sum(0)}
        sums = {name: part + sums[name] if sums else part for name, part in parts.items()}
    assert len(queue) == (2 * (1 + bias) if later else 0)
    assert (layer.weight.grad is None) == later
    queue.run(len(queue))
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, sums[name]) and parameter.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(INPUTS,), (0, INPUTS), (2, 0, INPUTS), (1, INPUTS), (2, 3, 4, INPUTS)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_shapes_are_those_of_torch(recipe, shape):
    layer, _ = layer_of(recipe, bias=True)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], OUTPUTS) and x.grad.shape == shape
    assert layer.weight.grad.shape == (OUTPUTS, INPUTS) and layer.bias.grad.shape == (OUTPUTS,)
    if x.numel() == 0:
        assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_an_input_and_a_gradient_that_lie_otherwise_in_memory_change_nothing():
    layer, _ = layer_of(Block())
    x, grad = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS)
    results = []
    for given, gradient in (
        (x, grad.expand(ROWS, OUTPUTS).contiguous()),
        (x.T.contiguous().T, grad.expand(ROWS, OUTPUTS)),
        (torch.cat((x, x), 1)[:, :INPUTS], grad.expand(ROWS, OUTPUTS)),
    ):
        layer.weight.grad = None
        own = given.detach().requires_grad_()
        y = layer(own)
        y.backward(gradient)
        results.append((y, own.grad, layer.weight.grad))
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
def test_bfloat16_weights_have_float32_main_gradients(later):
    recipe = Block()
    layer, _ = layer_of(recipe, bias=True, dtype=torch.bfloat16)
    keep_main_gradients(layer.parameters())
    queue = waiting(layer) if later else WeightGradients()
    expected = torch.zeros(OUTPUTS, INPUTS)
    for _ in range(3):
        x, grad = (torch.randn(ROWS, size, dtype=torch.bfloat16) for size in (INPUTS, OUTPUTS))
        layer(x).backward(grad)
        expected += reference.grad_weight(grad, x, recipe).float()
    queue.run(len(queue))
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, expected)
    assert not torch.equal(expected, expected.bfloat16().float()), "a sum that bfloat16 could hold says little"


@pytest.mark.parametrize(("frozen", "waits"), [("weight", 1), ("bias", 1), ("both", 0)])
def test_frozen_parameters_get_nothing_and_queue_nothing(frozen, waits):
    layer, _ = layer_of(Block(), bias=True)
    queue = waiting(layer)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, "both"))
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    layer(x).sum().backward()
    assert len(queue) == waits and x.grad is not None
    queue.run(waits)
    assert [p.grad is not None for p in layer.parameters()] == [p.requires_grad for p in layer.parameters()]


def test_an_input_without_gradient_costs_no_product_for_it():
    layer, _ = layer_of(Block())
    products = []
    layer.matmul.multiply = lambda *operands: products.append(1) or reference.multiply(*operands)
    layer(torch.randn(ROWS, INPUTS)).sum().backward()
    assert len(products) == 2 and layer.weight.grad is not None


def test_without_gradients_no_graph_is_kept():
    layer, _ = layer_of(Block())
    with torch.no_grad():
        assert layer(torch.randn(ROWS, INPUTS)).grad_fn is None


def test_a_hook_of_a_parameter_sees_its_gradient_at_once():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        layer, _ = layer_of(Block())
        queue, seen = waiting(layer), []
        getattr(layer.weight, register)(lambda tensor, seen=seen: seen.append(tensor.shape))
        layer(torch.randn(ROWS, INPUTS)).sum().backward()
        assert len(queue) == 0 and seen == [(OUTPUTS, INPUTS)]


def test_hooks_of_the_layer_run_as_before():
    layer, _ = layer_of(Block())
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    layer(torch.randn(ROWS, INPUTS, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_autocast_rounds_the_input_and_backward_keeps_the_format_of_its_forward():
    recipe = Block()
    layer, _ = layer_of(recipe, bias=True)
    x, grad = torch.randn(ROWS, INPUTS, requires_grad=True), torch.randn(ROWS, OUTPUTS, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = reference.forward(x.detach().bfloat16(), layer.weight.detach(), recipe)
    assert torch.equal(y, expected + layer.bias.detach().bfloat16())
    with torch.autocast("cpu", torch.float16):
        y.backward(grad)
    assert torch.equal(x.grad, reference.grad_input(grad, layer.weight.detach(), recipe).float())
    expected = reference.grad_weight(grad, x.detach().bfloat16(), recipe).float()
    assert layer.weight.grad.dtype == torch.float32 and torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64], ids=str)
def test_an_input_of_another_type_is_refused_as_torch_does(dtype):
    layer, _ = layer_of(Block(), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"a layer whose weight is torch.bfloat16 was given {dtype}"):
        layer(torch.ones(3, INPUTS, dtype=dtype))


def test_autocast_leaves_float64_alone():
    layer, _ = layer_of(Block(), dtype=torch.float64)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), reference.forward(x, layer.weight.detach(), Block()))


def test_rows_of_one_microbatch_share_no_scale_with_those_of_another():
    """Forward and input gradient are by token; the weight gradient's tiles lie along the tokens."""
    layer, _ = layer_of(Block())
    x = torch.randn(2 * 128, INPUTS)
    x[128:] *= 1000
    assert torch.equal(layer(x)[:128], layer(x[:128]))


# ---- what is kept of a weight ---------------------------------------------------------------------


def adamw(**options: bool) -> Callable[[nn.Linear, EmulateBackend], None]:
    def step(layer: nn.Linear, backend: EmulateBackend) -> None:
        layer.weight.grad = torch.randn_like(layer.weight)
        torch.optim.AdamW([layer.weight], lr=0.1, **options).step()

    return step


def sgd(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1, foreach=False).step()


@torch.no_grad()
def copied(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.weight.copy_(torch.randn_like(layer.weight))


@torch.no_grad()
def one_element(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.weight[0, 0] = 7.0


def loaded(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.load_state_dict({"weight": torch.randn_like(layer.weight)})


def replaced(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def replaced_where_it_was(layer: nn.Linear, backend: EmulateBackend) -> None:
    """The new one may get the memory, and even the address, of the one that is gone."""
    shape = layer.weight.shape
    del layer.weight
    layer.weight = nn.Parameter(torch.randn(shape))


def replaced_in_the_same_memory(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.weight = nn.Parameter(layer.weight.data.mul_(3.1))


def other_data(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def other_data_where_it_was(layer: nn.Linear, backend: EmulateBackend) -> None:
    for _ in range(2):  # the second is where the first was
        layer.weight.data = torch.randn_like(layer.weight)


def assigned(layer: nn.Linear, backend: EmulateBackend) -> None:
    for _ in range(2):
        layer.load_state_dict({"weight": torch.randn_like(layer.weight)}, assign=True)


def told(layer: nn.Linear, backend: EmulateBackend) -> None:
    """What no counter sees, the backend is told."""
    layer.weight.data.mul_(3.1)
    backend.weights_changed()


def cast(layer: nn.Linear, backend: EmulateBackend) -> None:
    layer.double()


CHANGES = {
    "AdamW": adamw(foreach=False),
    "AdamW, foreach": adamw(foreach=True),
    "AdamW, fused": adamw(fused=True),
    "SGD": sgd,
    "copy_": copied,
    "one element": one_element,
    "load_state_dict": loaded,
    "another parameter": replaced,
    "another parameter where it was": replaced_where_it_was,
    "another parameter in the same memory": replaced_in_the_same_memory,
    "other data": other_data,
    "other data where it was": other_data_where_it_was,
    "load_state_dict, assigned": assigned,
    "written behind the counter": told,
    "another type": cast,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recipe", [Block(), Current()], ids=str)
def test_results_are_those_of_the_weight_as_it_is(recipe, change):
    layer, backend = layer_of(recipe)

    def results() -> tuple[Tensor, Tensor]:
        dtype = layer.weight.dtype
        x, grad = torch.ones(3, INPUTS, dtype=dtype, requires_grad=True), torch.ones(3, OUTPUTS, dtype=dtype)
        y = layer(x)
        y.backward(grad)
        assert torch.equal(y, reference.forward(x.detach(), layer.weight.detach(), recipe))
        assert torch.equal(x.grad, reference.grad_input(grad, layer.weight.detach(), recipe))
        return y.float(), x.grad.float()

    before = results()
    CHANGES[change](layer, backend)
    after = results()
    if change != "another type":
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True)), "it must have changed something"


@pytest.mark.parametrize("size", [64, 128, 512])
@pytest.mark.parametrize("recipe", [Block(), Current()], ids=str)
def test_a_weight_that_is_computed_is_quantised_each_time(recipe, size):
    """Its memory is free for the next one."""
    layer = nn.Linear(size, size, bias=False)
    take_over(layer, EmulateBackend(recipe).linear())
    for _ in range(8):
        noisy = layer.weight + 0.3 * torch.randn_like(layer.weight)
        x = torch.randn(4, size, requires_grad=True)
        y = torch.func.functional_call(layer, {"weight": noisy}, (x,))
        assert torch.equal(y, reference.forward(x.detach(), noisy.detach(), recipe))
        y.sum().backward()
        assert torch.equal(x.grad, reference.grad_input(torch.ones_like(y), noisy.detach(), recipe))
        del noisy, y


@pytest.mark.parametrize("saved", ["as it is", "through hooks"])
@pytest.mark.parametrize(("recipe", "times"), [(Block(), 1), (Block("float32"), 1), (MXFP8(), 2)], ids=str)
def test_a_weight_is_quantised_once_a_step(recipe, times, saved, monkeypatch):
    """Square tiles serve forward and backward; others lie along what is summed over, once each way."""
    layer, backend = layer_of(recipe)
    counts = {"weight": 0, "rest": 0}

    def counting(name: str) -> Callable[..., reference.Quantised]:
        def quantise(*arguments: object) -> reference.Quantised:
            counts[name] += 1
            return reference.quantise(*arguments)

        return quantise

    monkeypatch.setattr(fp8_weight, "quantise", counting("weight"))
    monkeypatch.setattr(fp8_linear, "quantise", counting("rest"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(1, 4):
        for _ in range(4):
            hooks = saved_tensors_hooks(lambda x: x, lambda x: x) if saved == "through hooks" else nullcontext()
            with hooks:
                y = layer(torch.randn(ROWS, INPUTS, requires_grad=True))
            y.sum().backward()
        assert counts["weight"] == times * step
        optimizer.step()
        backend.weights_changed()
    assert counts["rest"] == 3 * 4 * 4  # input, gradient; and both again along the tokens


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("recipe", [Block(), MXFP8()], ids=str)
def test_an_evaluation_with_other_weights_leaves_nothing_to_training(recipe, mode):
    """As those who average weights do it: exchanged behind the counter, before an evaluation and after it."""
    layer, _ = layer_of(recipe)
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    own, average = layer.weight.detach().clone(), torch.randn_like(layer.weight)
    y = layer(x)
    for _ in range(2):
        layer.weight.data.copy_(average)
        with mode():
            assert torch.equal(layer(x), reference.forward(x.detach(), average, recipe))
        layer.weight.data.copy_(own)
        assert torch.equal(layer(x), y)
    y.sum().backward()
    assert torch.equal(x.grad, reference.grad_input(torch.ones_like(y), own, recipe))


def test_copies_of_a_layer_have_their_own_weight():
    layer, _ = layer_of(Block())
    x = torch.randn(ROWS, INPUTS)
    before = layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), before)
        with torch.no_grad():
            clone.weight.mul_(2.5)
        assert torch.equal(clone(x), reference.forward(x, clone.weight.detach(), Block()))
        assert torch.equal(layer(x), before)
        clone(x).sum().backward()
        assert layer.weight.grad is None and clone.weight.grad is not None
