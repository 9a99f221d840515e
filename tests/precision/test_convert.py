import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision import reference
from lightning_dualpipe.precision.convert import convert, restore
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.linear import make_linears_deferrable
from lightning_dualpipe.precision.recipe import Block, Delayed
from tests.precision.test_linear import odd_linears

RECIPE = Block()


def everything(name, layer):
    return True


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Sequential(nn.Linear(48, 16, bias=False)))


def by_definition(model, x):
    hidden = nn.functional.gelu(reference.forward(x, model[0].weight, RECIPE) + model[0].bias)
    return reference.forward(hidden, model[2][0].weight, RECIPE)


def test_linear_layers_multiply_by_the_backend_and_look_as_before(model):
    x, before = torch.randn(5, 32), model(torch.randn(5, 32))
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    assert convert(model, EmulateBackend(RECIPE), everything) == ["0", "2.0"]
    assert torch.equal(model(x), by_definition(model, x))
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == kinds
    assert before.shape == (5, 16)


def test_nobody_multiplies_past_a_layer():
    """Torch's encoder does, in an evaluation, unless a hook is registered."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    x, products = torch.randn(2, 5, 32), []
    with torch.no_grad():
        before = layer.eval()(x)
        convert(layer, EmulateBackend(RECIPE), everything)
        for linear in (layer.linear1, layer.linear2):
            multiply = linear.matmul
            vars(linear)["matmul"] = lambda *given, multiply=multiply: products.append(1) or multiply(*given)
        layer(x)
    assert len(products) == 2
    restore(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    assert not any(part._forward_pre_hooks for part in layer.modules())


def test_only_what_is_wanted_is_converted(model):
    x = torch.randn(5, 32)
    asked = []
    converted = convert(model, EmulateBackend(RECIPE), lambda name, layer: asked.append(name) or name == "2.0")
    assert converted == ["2.0"] and {"0", "2.0"} <= set(asked)
    hidden = nn.functional.gelu(nn.functional.linear(x, model[0].weight, model[0].bias))
    assert torch.equal(model(x), reference.forward(hidden, model[2][0].weight, RECIPE))


def test_experts_multiply_by_the_backend_each_weight_by_a_matmul_of_its_own():
    torch.manual_seed(0)
    experts = Experts(3, 32, 16)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert convert(nn.ModuleDict({"experts": experts}), EmulateBackend(RECIPE), everything) == ["experts"]
    first, second = experts.grouped_matmuls.values()
    assert first is not second
    x_RD, weights_R, counts = torch.randn(7, 32), torch.rand(7), [4, 0, 3]
    y_RD = experts(x_RD, weights_R, torch.tensor(counts))
    expected = []
    for x, gate_up, down, share in zip(
        x_RD.split(counts), experts.gate_up_proj, experts.down_proj, weights_R.split(counts), strict=True
    ):
        gate, up = reference.forward(x, gate_up, RECIPE).chunk(2, -1)
        expected.append(reference.forward(nn.functional.silu(gate) * up * share[:, None], down, RECIPE))
    # the order in which SwiGLU and weights are multiplied is the layer's own business, and moves a few roundings
    torch.testing.assert_close(y_RD, torch.cat(expected), rtol=0, atol=0.05 * float(y_RD.detach().abs().max()))
    plain = Experts(3, 32, 16)
    plain.load_state_dict(experts.state_dict())
    assert not torch.equal(plain(x_RD, weights_R, torch.tensor(counts)), y_RD)


def test_experts_that_are_spread_after_conversion_multiply_what_is_left():
    torch.manual_seed(0)
    experts = Experts(4, 32, 16)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    convert(experts, EmulateBackend(RECIPE), everything)
    x_RD, weights_R = torch.randn(8, 32), torch.rand(8)
    whole = experts(x_RD, weights_R, torch.tensor([2, 2, 2, 2]))
    experts.keep_experts(2, 2)
    assert torch.equal(experts(x_RD[4:], weights_R[4:], torch.tensor([2, 2])), whole[4:])


def test_layers_with_a_will_of_their_own_are_left_alone():
    model, x = odd_linears(), torch.randn(5, 4, dtype=torch.float64)
    before = model(x)
    assert convert(model, EmulateBackend(RECIPE), everything) == []
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("first", ["convert", "defer"])
def test_conversion_and_waiting_gradients_go_together_in_either_order(model, first):
    x, queue = torch.randn(5, 32), WeightGradients()
    queue.deferring = True
    if first == "convert":
        convert(model, EmulateBackend(RECIPE), everything)
    undo = make_linears_deferrable(model, queue)
    if first == "defer":
        convert(model, EmulateBackend(RECIPE), everything)
    y = model(x)
    assert torch.equal(y, by_definition(model, x))
    y.sum().backward()
    assert len(queue) == 3 and model[0].weight.grad is None
    queue.run(3)
    expected = reference.grad_weight(torch.ones_like(y), nn.functional.gelu(model[0](x)), RECIPE)
    assert torch.equal(model[2][0].weight.grad, expected)

    undo()
    if first == "convert":  # what was done first outlasts what was done after it
        assert torch.equal(model(x), y)
        model(x).sum().backward()
        assert len(queue) == 0


def test_converting_again_takes_the_new_backend(model):
    x = torch.randn(5, 32)
    convert(model, EmulateBackend(Block("float32")), everything)
    other = model(x)
    convert(model, EmulateBackend(RECIPE), everything)
    assert torch.equal(model(x), by_definition(model, x)) and not torch.equal(model(x), other)


def test_copies_compute_with_their_own_weights(model):
    x = torch.randn(5, 32)
    convert(model, EmulateBackend(RECIPE), everything)
    model(x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            clone[0].weight.mul_(1.7)
        assert torch.equal(clone(x), by_definition(clone, x))
        assert torch.equal(model(x), by_definition(model, x))


def test_a_recipe_that_remembers_is_not_emulated():
    with pytest.raises(
        ConfigurationError, match="recipe 'delayed' is not emulated: its scales come from earlier steps"
    ):
        EmulateBackend(Delayed())
