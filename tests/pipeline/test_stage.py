import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_dualpipe.interface import Layer, Phase, WeightGradients, as_layers, is_recomputing
from lightning_dualpipe.pipeline.stage import Stage
from lightning_dualpipe.precision.linear import make_linears_deferrable
from tests.pipeline.small import KINDS, WIDTH, Ladder, build_batch

SIZES = [4, 1, 3]  # samples of each microbatch


def middle_stage(module, *, index=1, num_stages=3, **options):
    """``module`` as a stage that is neither first nor last, its linears ready to wait."""
    queue = WeightGradients()
    make_linears_deferrable(module, queue)
    return Stage(index, num_stages, Ladder(0), as_layers([module]), queue, **options)


def values_of(samples, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    h_BD, total_B = torch.randn(samples, WIDTH, generator=generator).double(), torch.zeros(samples).double()
    return h_BD, torch.randint(KINDS, (samples,), generator=generator), total_B


def gradients_for(samples, *, seed=2):
    """Those of the floating-point outputs."""
    h_BD, _, total_B = values_of(samples, seed=seed)
    return h_BD, total_B + 0.3


def rungs():
    return Ladder(2).rungs[0]


def run(program):
    """Gradients of the parameters after ``program(stage)``, and what the stage before received."""
    module = rungs()
    stage = middle_stage(module)
    for microbatch, samples in enumerate(SIZES):
        stage.forward(microbatch, values_of(samples, seed=microbatch), {})
    received = program(stage)
    assert stage.num_held == 0 and stage.num_waiting == 0
    return {name: parameter.grad for name, parameter in module.named_parameters()}, received


def at_once(stage):
    return [stage.backward(m, gradients_for(samples, seed=m)) for m, samples in enumerate(SIZES)]


def each_soon_after(stage):
    received = []
    for microbatch, samples in enumerate(SIZES):
        received.append(stage.backward_input(microbatch, gradients_for(samples, seed=microbatch)))
        stage.backward_weight(microbatch)
    return received


def all_at_the_end(stage):
    received = [stage.backward_input(m, gradients_for(samples, seed=m)) for m, samples in enumerate(SIZES)]
    for microbatch in range(len(SIZES)):
        stage.backward_weight(microbatch)
    return received


def some_at_once(stage):
    first = stage.backward_input(0, gradients_for(SIZES[0], seed=0))
    stage.backward_weight(0)
    second = stage.backward(1, gradients_for(SIZES[1], seed=1))
    third = stage.backward_input(2, gradients_for(SIZES[2], seed=2))
    stage.backward_weight(2)
    return [first, second, third]


@pytest.mark.parametrize("program", [each_soon_after, all_at_the_end, some_at_once])
def test_weight_gradients_that_waited_are_the_same_to_the_bit(program):
    (expected, expected_received), (found, received) = run(at_once), run(program)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    for mine, theirs in zip(received, expected_received, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_gradients_are_those_of_autograd():
    module = rungs()
    total = 0
    for microbatch, samples in enumerate(SIZES):
        outputs = module(*values_of(samples, seed=microbatch))
        gradients = gradients_for(samples, seed=microbatch)
        total = total + (outputs[0] * gradients[0]).sum() + (outputs[2] * gradients[1]).sum()
    total.backward()
    found, _ = run(at_once)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-13, atol=1e-13, msg=name)


def test_only_what_cannot_wait_is_computed_with_the_input_gradient():
    module = rungs()
    stage = middle_stage(module)
    stage.forward(0, values_of(3), {})
    stage.backward_input(0, gradients_for(3))
    waiting = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert waiting == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert stage.num_held == 0 and stage.num_waiting == 4

    stage.backward_weight(0)
    assert all(p.grad is not None and not p.grad.requires_grad for p in module.parameters())


def test_a_backward_that_fails_does_not_leave_later_ones_waiting():
    stage = middle_stage(rungs())
    stage.forward(0, values_of(3), {})
    with pytest.raises(RuntimeError):
        stage.backward_input(0, (torch.zeros(2, 2), torch.zeros(9)))
    assert not stage.weight_gradients.deferring


def test_what_is_frozen_gets_no_gradient_and_passes_others_on():
    module = rungs()
    expected = run(at_once)[1]
    for frozen in ("all", "linears"):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen == "linears" and "up" not in name and "down" not in name)
        stage = middle_stage(module)
        for microbatch, samples in enumerate(SIZES):
            stage.forward(microbatch, values_of(samples, seed=microbatch), {})
            received = stage.backward_input(microbatch, gradients_for(samples, seed=microbatch))
            assert all(torch.equal(a, b) for a, b in zip(received, expected[microbatch], strict=True))
            stage.backward_weight(microbatch)
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in module.parameters())


class Double(nn.Module):
    def forward(self, h_BD, ids_B, total_B):
        return 2 * h_BD, ids_B, total_B


def test_a_stage_without_parameters_passes_values_and_gradients():
    stage = middle_stage(Double())
    h_BD, ids_B, total_B = values_of(3)
    out = stage.forward(0, (h_BD, ids_B, total_B), {})
    assert torch.equal(out[0], 2 * h_BD) and torch.equal(out[1], ids_B) and torch.equal(out[2], total_B)
    gradients = gradients_for(3)
    received = stage.backward(0, gradients)
    assert torch.equal(received[0], 2 * gradients[0]) and torch.equal(received[1], gradients[1])


class Overwrites(nn.Module):
    def forward(self, h_BD, ids_B, total_B):
        return h_BD.mul_(3).relu_(), ids_B, total_B.add_(1)


def test_the_first_layer_of_a_stage_may_work_in_place():
    stage = middle_stage(Overwrites())
    values, gradients = values_of(3), gradients_for(3)
    h_BD = values[0].clone()
    outputs = stage.forward(0, values, {})
    torch.testing.assert_close(outputs[0], (3 * h_BD).relu())
    received = stage.backward(0, gradients)
    torch.testing.assert_close(received[0], 3 * gradients[0] * (h_BD > 0))
    torch.testing.assert_close(received[1], gradients[1])


class Forgets(nn.Module):
    """Its outputs depend on its parameter only, or on nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, h_BD, ids_B, total_B):
        return self.weight.expand_as(h_BD), ids_B + 1, torch.zeros_like(total_B)


def test_an_input_that_is_not_used_has_gradient_zero():
    """Every boundary always carries the same tensors."""
    module = Forgets()
    stage = middle_stage(module)
    stage.forward(0, values_of(3), {})
    gradients = gradients_for(3)
    received = stage.backward(0, gradients)
    assert [tuple(each.shape) for each in received] == [(3, WIDTH), (3,)]
    assert not any(each.any() for each in received)
    torch.testing.assert_close(module.weight.grad, gradients[0].sum()[None])


def test_integers_cross_a_stage_and_no_gradient_belongs_to_them():
    stage = middle_stage(rungs())
    _, ids_B, _ = values = values_of(5)
    out = stage.forward(0, values, {})
    assert torch.equal(out[1], ids_B) and out[1].dtype == torch.int64
    assert len(stage.backward(0, gradients_for(5))) == 2


def test_what_leaves_a_stage_carries_no_graph():
    stage = middle_stage(rungs())
    out = stage.forward(0, values_of(2), {})
    assert not any(value.requires_grad for value in out)
    assert not any(value.requires_grad for value in stage.backward(0, gradients_for(2)))


def test_the_first_stage_takes_the_model_s_inputs_and_returns_no_gradients():
    model = Ladder(2)
    batch = build_batch(4)
    stage = Stage(0, 2, model, as_layers(model.layers()[:2]), WeightGradients())
    out = stage.forward(0, (), batch)
    torch.testing.assert_close(out[0], model.rungs[1](*model.rungs[0](*model.inputs(batch)))[0].detach())
    assert stage.backward(0, gradients_for(4)) == ()
    assert all(parameter.grad is not None for parameter in model.rungs.parameters())


def test_the_last_stage_returns_the_model_s_sums_and_starts_from_their_loss():
    model = Ladder(1)
    batch = build_batch(4)
    stage = Stage(1, 2, model, as_layers(model.layers()), WeightGradients())
    sums = stage.forward(0, values_of(4), batch)
    assert set(sums) == {"loss", "tokens", "hits", "penalty"}
    assert not any(value.requires_grad for value in sums.values())

    values = seen = tuple(value.requires_grad_(value.is_floating_point()) for value in values_of(4))
    for layer in stage.layers:
        seen = layer(seen, batch)
    expected = model.loss(seen, batch)["loss"]
    assert torch.equal(expected, sums["loss"])
    for mine, theirs in zip(
        stage.backward(0, None), torch.autograd.grad(expected, (values[0], values[2])), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_without_labels_the_layers_for_the_loss_are_skipped():
    model = Ladder(1)
    stage = Stage(0, 1, model, as_layers(model.layers()), WeightGradients())
    batch = build_batch(4)
    prediction = stage.predict((), {name: value for name, value in batch.items() if name != "labels"})
    assert torch.equal(prediction[0], model({"x": batch["x"], "ids": batch["ids"]}))


class Saved:
    """What autograd keeps of a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_a_graph_lives_until_its_backward():
    stage = middle_stage(rungs())
    kept = []
    for microbatch in range(3):
        kept.append(weakref.WeakSet())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept[-1].add(saved := Saved(tensor)) or saved, lambda saved: saved.tensor
        ):
            stage.forward(microbatch, values_of(2), {})
    assert stage.num_held == 3 and all(kept)
    stage.backward(1, gradients_for(2))
    assert stage.num_held == 2 and [bool(each) for each in kept] == [True, False, True]


def test_gradients_arrive_in_the_format_of_the_wire_and_are_used_in_that_of_the_output():
    module = rungs().to(torch.bfloat16)
    stage = middle_stage(module)
    h_BD, ids_B, total_B = values_of(3)
    stage.forward(0, (h_BD.bfloat16(), ids_B, total_B.bfloat16()), {})
    received = stage.backward(0, tuple(gradient.float() for gradient in gradients_for(3)))
    assert all(each.dtype == torch.bfloat16 for each in received)


def test_every_forward_runs_in_the_context_and_no_backward_does():
    entered = []

    @contextmanager
    def context():
        entered.append("in")
        with torch.autocast("cpu", torch.bfloat16):
            yield
        entered.append("out")

    module = nn.Linear(WIDTH, WIDTH)
    seen = []
    module.register_full_backward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    stage = middle_stage(module, context=context)
    x = torch.randn(2, WIDTH)
    assert stage.forward(0, (x,), {})[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        stage.backward(0, (torch.ones(2, WIDTH),))
    assert stage.evaluate((x,), {})[0].dtype == torch.bfloat16
    assert stage.predict((x,), {})[0].dtype == torch.bfloat16
    assert entered == ["in", "out"] * 3 and seen == [False]


def test_a_phase_that_is_to_be_recomputed_runs_again_for_its_backward_and_changes_no_bit():
    (expected, expected_received), module, runs = run(at_once), rungs(), []

    def recorded(*values):
        runs.append(is_recomputing())
        return module(*values)

    layer = Layer("recomputed", (Phase("rung", recorded, recompute=True),), (module,), cost=1)
    stage = Stage(1, 3, module, [layer], WeightGradients())
    make_linears_deferrable(module, stage.weight_gradients)
    for microbatch, samples in enumerate(SIZES):
        stage.forward(microbatch, values_of(samples, seed=microbatch), {})
    assert runs == [False] * len(SIZES)
    received = each_soon_after(stage)

    assert runs == [False] * len(SIZES) + [True] * len(SIZES)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    for mine, theirs in zip(received, expected_received, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_a_stage_was_given_is_freed_where_its_backward_does_not_need_it():
    linear = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)  # its backward needs the weight alone
    stage = Stage(1, 3, linear, as_layers([linear]), WeightGradients())
    given = torch.ones(3, WIDTH)
    (out,) = stage.forward(0, (given,), {})
    memory = [weakref.ref(each.untyped_storage()) for each in (given, out)]
    del given, out
    assert not any(each() for each in memory)
    (gradient,) = stage.backward(0, (torch.ones(3, WIDTH),))
    assert torch.equal(gradient, torch.ones(3, WIDTH) @ linear.weight)
