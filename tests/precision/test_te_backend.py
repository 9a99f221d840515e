"""The backend of Transformer Engine over a fake of it, which forgets and overwrites where the real one does.

What a GPU is needed for: ``test_fp8_on_cuda.py``.
"""

import copy
import gc
import pickle
import re
import sys
import types
import weakref
from importlib import import_module
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision import reference, te_backend
from lightning_dualpipe.precision.convert import convert
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.linear import make_linears_deferrable
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from lightning_dualpipe.precision.recipe import BF16, MXFP8, Block, Current, Delayed
from lightning_dualpipe.precision.te_backend import TEBackend, why_not_te
from tests.precision.fake_te import fake_te
from tests.ranks import run_ranks

RECIPES = [Block(), Block("float32"), Current(), Current("e4m3"), MXFP8()]
COUNTS = [32, 0, 64, 32]


@pytest.fixture(autouse=True)
def fake():
    with fake_te():
        yield


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dyadic(*shape, seed=0):
    """Numbers whose products are added exactly, in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def queue_that(deferring):
    queue = WeightGradients()
    queue.deferring = deferring
    return queue


def run_linear(matmul, weight, *, microbatches=1, queue=None, rows=64, dtype=torch.float32, make=normal, bias=None):
    """Outputs and input gradients; weight gradients are in ``weight.grad``."""
    found = []
    for index in range(microbatches):
        x = make(2, rows // 2, weight.shape[1], seed=10 + index).to(dtype).requires_grad_()
        y = matmul(x, weight, bias, queue)
        y.backward(make(*y.shape, seed=20 + index).to(dtype))
        found += [y.detach(), x.grad]
    if queue is not None:
        queue.run(len(queue))
    return found


def run_grouped(matmul, weight, counts, *, microbatches=1, queue=None, dtype=torch.float32, make=normal, form=list):
    found = []
    for index in range(microbatches):
        x = make(sum(counts), weight.shape[2], seed=10 + index).to(dtype).requires_grad_()
        y = matmul(x, weight, form(counts), queue)
        y.backward(make(*y.shape, seed=20 + index).to(dtype))
        found += [y.detach(), x.grad]
    if queue is not None:
        queue.run(len(queue))
    return found


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


def parameter(*shape, dtype=torch.float32, make=normal):
    return nn.Parameter(make(*shape, seed=1).to(dtype))


# ---- the same bits as the definition ----------------------------------------------------------


@pytest.mark.parametrize("deferring", [None, False, True], ids=["no queue", "at once", "deferred"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_linear_layer_has_the_bits_of_the_definition(recipe, deferring):
    ours, theirs = parameter(96, 160), parameter(96, 160)
    queue = None if deferring is None else queue_that(deferring)
    found = run_linear(TEBackend(recipe).linear(), ours, microbatches=3, queue=queue)
    want = run_linear(EmulateBackend(recipe).linear(), theirs, microbatches=3)
    assert_same([*found, ours.grad], [*want, theirs.grad])


@pytest.mark.parametrize("form", [list, torch.tensor], ids=["list", "tensor"])
@pytest.mark.parametrize("deferring", [None, False, True], ids=["no queue", "at once", "deferred"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_experts_have_the_bits_of_the_definition(recipe, deferring, form):
    ours, theirs = parameter(4, 96, 160), parameter(4, 96, 160)
    queue = None if deferring is None else queue_that(deferring)
    found = run_grouped(TEBackend(recipe).grouped_linear(), ours, COUNTS, microbatches=3, queue=queue, form=form)
    want = run_grouped(EmulateBackend(recipe).grouped_linear(), theirs, COUNTS, microbatches=3)
    assert_same([*found, ours.grad], [*want, theirs.grad])
    assert not ours.grad[1].any() and ours.grad[0].any()


@pytest.mark.parametrize("rows", [0, 2, 18, 46])
def test_any_number_of_rows(rows):
    ours, theirs = parameter(32, 48, make=dyadic), parameter(32, 48, make=dyadic)
    found = run_linear(TEBackend(Block()).linear(), ours, rows=rows, make=dyadic, queue=queue_that(True))
    want = run_linear(EmulateBackend(Block()).linear(), theirs, rows=rows, make=dyadic)
    assert_same([*found, ours.grad], [*want, theirs.grad])


@pytest.mark.parametrize("deferring", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 17], [0, 0, 1], [0, 0, 0], [16, 16, 16]], ids=str)
def test_any_number_of_rows_of_each_expert(counts, deferring):
    ours, theirs = parameter(3, 32, 48, make=dyadic), parameter(3, 32, 48, make=dyadic)
    matmul = TEBackend(Block()).grouped_linear()
    found = run_grouped(matmul, ours, counts, make=dyadic, queue=queue_that(deferring))
    want = run_grouped(EmulateBackend(Block()).grouped_linear(), theirs, counts, make=dyadic)
    assert_same([*found, ours.grad], [*want, theirs.grad])


def test_a_bias_is_added_and_has_its_gradient_of_all_microbatches():
    biases = parameter(32), parameter(32)
    ours, theirs = parameter(32, 48), parameter(32, 48)
    found = run_linear(TEBackend(Block()).linear(), ours, microbatches=3, bias=biases[0], queue=queue_that(True))
    want = run_linear(EmulateBackend(Block()).linear(), theirs, microbatches=3, bias=biases[1])
    assert_same([*found, ours.grad, biases[0].grad], [*want, theirs.grad, biases[1].grad])


# ---- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("deferring", [False, True])
def test_half_precision_sums_in_float32_without_rounding_between(deferring):
    """In the kernel: the definition rounds each microbatch's gradient to bfloat16 first, so 2^-8 apart at most."""
    ours, theirs = (parameter(4, 32, 48, dtype=torch.bfloat16) for _ in range(2))
    keep_main_gradients([ours, theirs])
    queue = queue_that(deferring)
    run_grouped(TEBackend(Block()).grouped_linear(), ours, COUNTS, microbatches=4, queue=queue, dtype=torch.bfloat16)
    run_grouped(EmulateBackend(Block()).grouped_linear(), theirs, COUNTS, microbatches=4, dtype=torch.bfloat16)
    assert ours.grad.dtype == torch.float32
    error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
    assert 0 < error < 2**-8


def test_deferred_gradients_are_immediate_ones_in_half_precision():
    found = []
    for deferring in (False, True):
        weight = parameter(32, 48, dtype=torch.bfloat16)
        keep_main_gradients([weight])
        run_linear(
            TEBackend(Block()).linear(), weight, microbatches=4, queue=queue_that(deferring), dtype=torch.bfloat16
        )
        found.append(weight.grad)
    assert_same(*[[each] for each in found])


def test_gradients_in_half_precision_go_through_autograd():
    """Nobody has asked for float32 ones: a plain optimizer refuses them."""
    weight, queue = parameter(32, 48, dtype=torch.bfloat16), queue_that(True)
    x = normal(16, 48, dtype=torch.bfloat16)
    TEBackend(Block()).linear()(x, weight, None, queue).sum().backward()
    assert len(queue) == 0 and weight.grad.dtype == torch.bfloat16


def test_an_earlier_gradient_is_added_to_in_its_own_memory():
    weight, queue = parameter(32, 48), queue_that(True)
    weight.grad = torch.ones(32, 48)
    before = weight.grad
    run_linear(TEBackend(Block()).linear(), weight, queue=queue)
    expected = parameter(32, 48)
    run_linear(EmulateBackend(Block()).linear(), expected)
    assert weight.grad is before and torch.equal(before, 1 + expected.grad)


def test_weight_gradients_wait_and_come_in_any_order():
    weight, queue = parameter(32, 48), queue_that(True)
    matmul = TEBackend(Block()).linear()
    xs = [normal(16, 48, seed=seed).requires_grad_() for seed in range(3)]
    for x in xs:
        matmul(x, weight, None, queue).sum().backward()
        assert x.grad is not None
    assert len(queue) == 3 and not weight.grad.any()
    for compute in reversed(queue.take()):
        compute()
    expected = parameter(32, 48)
    for x in reversed(xs):
        EmulateBackend(Block()).linear()(x, expected, None, None).sum().backward()
    assert torch.equal(weight.grad, expected.grad)


def test_a_weight_gradient_may_wait_while_others_do_not():
    weight, expected, queue = parameter(32, 48), parameter(32, 48), queue_that(True)
    matmul = TEBackend(Block()).linear()
    for queue.deferring in (True, False):
        matmul(normal(16, 48), weight, None, queue).sum().backward()
        EmulateBackend(Block()).linear()(normal(16, 48), expected, None, None).sum().backward()
    assert len(queue) == 1
    queue.run(1)
    assert torch.equal(weight.grad, expected.grad)


def test_a_forgotten_weight_gradient_is_never_taken_for_another():
    """A training step that fails leaves some behind."""
    weight, queue = parameter(32, 48), queue_that(True)
    matmul = TEBackend(Block()).linear()
    matmul(normal(16, 48, seed=5), weight, None, queue).sum().backward()
    queue.take()
    weight.grad = None
    run_linear(matmul, weight, queue=queue)
    expected = parameter(32, 48)
    run_linear(EmulateBackend(Block()).linear(), expected)
    assert torch.equal(weight.grad, expected.grad)


def test_a_gradient_that_is_replaced_under_a_waiting_one_is_an_error():
    weight, queue = parameter(32, 48), queue_that(True)
    TEBackend(Block()).linear()(normal(16, 48), weight, None, queue).sum().backward()
    weight.grad = None
    with pytest.raises(AssertionError, match="was replaced"):
        queue.run(1)


def test_without_a_queue_autograd_is_given_the_gradient():
    """And with it whatever hangs on autograd: DDP's reducer, for instance, which no parameter shows."""
    weight, expected = parameter(32, 48), parameter(32, 48)
    (gradient,) = torch.autograd.grad(TEBackend(Block()).linear()(normal(16, 48), weight, None, None).sum(), weight)
    EmulateBackend(Block()).linear()(normal(16, 48), expected, None, None).sum().backward()
    assert weight.grad is None and torch.equal(gradient, expected.grad)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_parameter_see_its_gradient(register):
    weight, queue, seen = parameter(32, 48), queue_that(True), []
    getattr(weight, register)(lambda tensor: seen.append(tensor.shape))
    run_linear(TEBackend(Block()).linear(), weight, queue=queue)
    expected = parameter(32, 48)
    run_linear(EmulateBackend(Block()).linear(), expected)
    assert seen == [(32, 48)] and torch.equal(weight.grad, expected.grad)


@pytest.mark.parametrize("queue", [None, queue_that(True)], ids=["no queue", "queue"])
def test_a_computed_weight_passes_its_gradient_on(queue):
    base, expected = parameter(32, 48), parameter(32, 48)
    run_linear(TEBackend(Block()).linear(), 2 * base, queue=queue)
    run_linear(EmulateBackend(Block()).linear(), 2 * expected)
    assert torch.equal(base.grad, expected.grad)


def test_a_weight_that_is_computed_is_quantised_each_time():
    """Its memory is free for the next one."""
    matmul, base = TEBackend(Block()).linear(), parameter(128, 128)
    for step in range(8):
        noisy, x = base + 0.3 * normal(128, 128, seed=step), normal(32, 128, seed=9)
        assert torch.equal(matmul(x, noisy, None, None), reference.forward(x, noisy.detach(), Block()))
        del noisy


def test_frozen_weights_and_inputs_without_gradient():
    weight, queue = parameter(32, 48), queue_that(True)
    x = normal(16, 48).requires_grad_()
    TEBackend(Block()).linear()(x, weight.detach(), None, queue).sum().backward()
    assert x.grad is not None and len(queue) == 0
    TEBackend(Block()).linear()(x.detach(), weight, None, queue).sum().backward()
    queue.run(1)
    assert weight.grad.any()


@pytest.mark.parametrize("deferring", [None, False, True], ids=["no queue", "at once", "deferred"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_that_runs_again_in_its_backward(deferring, use_reentrant):
    """In the middle of a backward that has been told whether to delay, and outside of every autocast."""
    ours, theirs = parameter(4, 32, 48), parameter(4, 32, 48)
    queue = None if deferring is None else queue_that(deferring)
    matmul, definition = TEBackend(Block()).grouped_linear(), EmulateBackend(Block()).grouped_linear()
    x = normal(sum(COUNTS), 48).requires_grad_()
    for _ in range(2):
        y = checkpoint(lambda x: matmul(x, ours, COUNTS, queue), x, use_reentrant=use_reentrant)
        y.square().sum().backward()
    if queue is not None:
        queue.run(len(queue))
    found, x.grad = x.grad, None
    for _ in range(2):
        definition(x, theirs, COUNTS, None).square().sum().backward()
    assert_same([found, ours.grad], [x.grad, theirs.grad])


def ddp_gradients(rank):
    """Averaged over two ranks, which see different rows."""
    torch.manual_seed(0)
    model, alone = nn.Linear(48, 32), nn.Linear(48, 32)
    alone.load_state_dict(model.state_dict())
    with fake_te():
        convert(model, TEBackend(Block()), lambda name, layer: True)
        convert(alone, EmulateBackend(Block()), lambda name, layer: True)
        model = DistributedDataParallel(model)
        for step in range(2):
            model(normal(16, 48, seed=2 * step + rank)).square().sum().backward()
            for each in range(2):
                (alone(normal(16, 48, seed=2 * step + each)).square().sum() / 2).backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return [torch.allclose(ours.grad, theirs.grad, rtol=1e-5) for ours, theirs in pairs]


def test_ddp_averages_its_gradients():
    assert run_ranks(2, ddp_gradients) == [[True, True]] * 2


# ---- weights that are kept --------------------------------------------------------------------


def count_quantisations(monkeypatch):
    module = sys.modules["transformer_engine.pytorch.module.base"]
    real, calls = module.quantise, []

    def counting(x, how):
        if how.tile == (128, 128):
            calls.append(x.shape)
        return real(x, how)

    monkeypatch.setattr(module, "quantise", counting)
    return calls


def test_weights_are_quantised_once_in_a_step_and_again_after_it(monkeypatch):
    backend = TEBackend(Block())
    weight, queue = parameter(32, 48), queue_that(True)
    matmul = backend.linear()
    run_linear(matmul, weight, queue=queue)
    calls = count_quantisations(monkeypatch)
    backend.weights_changed()
    run_linear(matmul, weight, microbatches=3, queue=queue)
    assert len(calls) == 1
    with torch.no_grad():
        weight.add_(1)
    run_linear(matmul, weight, queue=queue)
    assert len(calls) == 2
    weight.data.mul_(2)  # which no version counts
    backend.weights_changed()
    run_linear(matmul, weight, queue=queue)
    assert len(calls) == 3
    torch.optim.AdamW([weight], fused=True).step()  # which counts no version either
    run_linear(matmul, weight, queue=queue)
    assert len(calls) == 4


@pytest.mark.parametrize("deferring", [None, True], ids=["no queue", "deferred"])
@pytest.mark.parametrize("kind", ["linear", "grouped_linear"])
def test_several_steps_with_evaluations_between(kind, deferring):
    """Every loss and weight is that of the definition."""

    def train(backend, queue):
        weight = parameter(4, 32, 48) if kind == "grouped_linear" else parameter(32, 48)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        matmul, losses = getattr(backend, kind)(), []
        form = (COUNTS, queue) if kind == "grouped_linear" else (None, queue)
        for step in range(4):
            for microbatch in range(2):
                x = normal(sum(COUNTS), 48, seed=10 * step + microbatch).requires_grad_()
                loss = matmul(x, weight, *form).square().mean()
                loss.backward()
                losses.append(loss.detach())
            if queue is not None:
                queue.run(len(queue))
            if step % 2:
                with torch.no_grad():
                    losses.append(matmul(normal(sum(COUNTS), 48), weight, *form).mean())
            optimizer.step()
            optimizer.zero_grad()
            backend.weights_changed()
            with torch.no_grad():
                losses.append(matmul(normal(sum(COUNTS), 48), weight, *form).mean())
        return [*losses, weight.detach()]

    queue = None if deferring is None else queue_that(deferring)
    assert_same(train(TEBackend(Block()), queue), train(EmulateBackend(Block()), None))


def test_the_first_layer_then_an_inner_one():
    """What was kept without W^T does not serve a backward that needs it."""
    weight, matmul = parameter(32, 48), TEBackend(Block()).linear()
    matmul(normal(16, 48), weight, None, None).sum().backward()
    x = normal(16, 48).requires_grad_()
    matmul(x, weight, None, None).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["linear", "grouped_linear"])
def test_an_evaluation_with_other_weights_leaves_nothing_to_training(kind):
    """Weights that are exchanged behind the counter of writes, as by ``EMAWeightAveraging``."""
    weight = parameter(4, 32, 48) if kind == "grouped_linear" else parameter(32, 48)
    own, average = weight.detach().clone(), normal(*weight.shape, seed=7)
    form = (COUNTS, None) if kind == "grouped_linear" else (None, None)
    x, matmul = normal(sum(COUNTS), 48).requires_grad_(), getattr(TEBackend(Block()), kind)()
    definition = getattr(EmulateBackend(Block()), kind)
    before = matmul(x, weight, *form)
    weight.data.copy_(average)
    with torch.no_grad():
        assert_same([matmul(x, weight, *form)], [definition()(x, average, *form)])
    weight.data.copy_(own)
    assert_same([matmul(x, weight, *form)], [before])


def test_an_evaluation_in_inference_mode_leaves_nothing_for_a_training_step():
    weight, matmul = parameter(32, 48), TEBackend(Block()).linear()
    for _ in range(2):
        with torch.inference_mode():
            matmul(normal(16, 48), weight, None, None)
        matmul(normal(16, 48), weight, None, None).sum().backward()  # its input needs no gradient, as in evaluation


@pytest.mark.parametrize("deferring", [None, True], ids=["no queue", "deferred"])
def test_nothing_outlives_its_step(deferring):
    """A graph that somebody still holds, a loss for instance, does not hold gradients."""
    weight = parameter(32, 48)
    queue = None if deferring is None else queue_that(deferring)
    y = TEBackend(Block()).linear()(normal(16, 48).requires_grad_(), weight, None, queue)
    loss = y.sum()
    loss.backward()
    if queue is not None:
        queue.run(1)
    gradient = weakref.ref(weight.grad)
    weight.grad = None
    gc.collect()
    assert gradient() is None and loss.grad_fn is not None


def test_graphs_that_are_dropped_are_freed():
    """At once, without a collection: neither the input nor what was lent is part of a cycle."""
    weight, matmul = parameter(32, 48), TEBackend(Block()).linear()
    x = normal(16, 48).requires_grad_()
    seen = weakref.ref(x), weakref.ref(weight)
    gc.disable()
    try:
        for backward in (False, True):
            y = matmul(x, weight, None, None)
            if backward:
                y.sum().backward()
            del y
        del x, weight
        assert [each() for each in seen] == [None, None]
    finally:
        gc.enable()


def test_autocast_and_delayed_scaling():
    from transformer_engine.pytorch.quantization import IN_FORCE  # the fake's

    depth = len(IN_FORCE)
    weight = parameter(32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert TEBackend(Block()).linear()(normal(16, 48), weight, None, None).dtype == torch.bfloat16
    backend = TEBackend(Delayed(history=16))
    matmul = backend.linear()
    with backend.context():
        assert len(IN_FORCE) == depth + 1  # its own regions are inside of one, and only the outermost learns
        run_linear(matmul, weight, microbatches=2)
    assert weight.grad.any() and len(IN_FORCE) == depth
    with TEBackend(Block()).context():  # nothing of other layers of this library becomes FP8
        assert len(IN_FORCE) == depth


# ---- in a model -------------------------------------------------------------------------------


class Model(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 48, bias=False))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_a_converted_model_looks_the_same_and_can_be_copied(model):
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    convert(model, TEBackend(Block()), lambda name, layer: True)
    x = normal(16, 48)
    model(x).sum().backward()
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone.zero_grad()
        clone(x).sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(clone.parameters(), model.parameters(), strict=True))


def test_a_model_whose_linears_wait_trains_as_one_whose_do_not(model):
    found, x = [], normal(40, 48)
    for deferring in (False, True):
        clone = copy.deepcopy(model)
        convert(clone, TEBackend(Block()), lambda name, layer: True)
        queue = queue_that(deferring)
        make_linears_deferrable(clone, queue)
        clone(x).square().sum().backward()
        assert (len(queue) == 2) is deferring
        queue.run(len(queue))
        found.append([parameter.grad for parameter in clone.parameters()])
    assert_same(*found)


# ---- what stands against it -------------------------------------------------------------------


def test_sizes_and_numbers_that_it_does_not_take():
    with pytest.raises(ConfigurationError, match=r"24 outputs and 48 inputs: recipe 'block' .* of 16; exclude"):
        TEBackend(Block()).linear()(normal(16, 48), parameter(24, 48), None, None)
    with pytest.raises(ConfigurationError, match="multiples of 32"):
        TEBackend(MXFP8()).linear()(normal(16, 48), parameter(32, 48), None, None)
    with pytest.raises(ConfigurationError, match="given float64; use backend='emulate'"):
        TEBackend(Block()).linear()(normal(16, 48).double(), parameter(32, 48).double(), None, None)


def gpu(capability=(9, 0), cuda="13.0", name="NVIDIA H200"):
    return mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        get_device_capability=lambda: capability,
        get_device_name=lambda: name,
    ), mock.patch.object(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("recipe", "machine", "words"),
    [
        (Block(), {}, None),
        (Current(), {"capability": (8, 9)}, None),
        (MXFP8(), {"capability": (10, 0)}, None),
        (BF16(), {}, "quantises nothing"),
        (Block(), {"capability": (8, 9), "name": "L4"}, r"needs a Hopper GPU or newer, and this is L4 \(SM89\); use"),
        (Current(), {"capability": (8, 0), "name": "A100"}, "needs an Ada GPU or newer, and this is A100"),
        (MXFP8(), {}, "needs a Blackwell GPU, and this is NVIDIA H200 .*use recipe='block'"),
        (Block(), {"cuda": "12.8"}, "needs a torch built for CUDA 12.9 or newer, and this one is for 12.8"),
        (Block("float32"), {"capability": (10, 0)}, "use scales='power_of_two'"),
        (Block(), {"capability": (10, 0)}, None),
    ],
)
def test_what_is_missing_is_said(recipe, machine, words):
    cuda, version = gpu(**machine)
    with cuda, version:
        refused = why_not_te(recipe)
        assert refused is None if words is None else re.search(words, refused), refused


def test_what_the_library_says_is_passed_on(monkeypatch):
    import transformer_engine.pytorch.quantization as theirs

    monkeypatch.setattr(theirs, "REASON", "the driver is too old")
    cuda, version = gpu()
    with cuda, version:
        assert why_not_te(Block()).endswith("refuses recipe 'block' on NVIDIA H200 (SM90): the driver is too old")
        monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "is_fp8_block_scaling_available")
        assert "cannot be used here: ModuleNotFoundError" in why_not_te(Block())  # 2.8 has them elsewhere


def test_the_names_of_2_8(monkeypatch):
    theirs = import_module("transformer_engine.pytorch")
    monkeypatch.delattr(theirs, "autocast")
    monkeypatch.delattr(theirs, "is_fp8_block_scaling_available")

    class FP8GlobalStateManager:
        @classmethod
        def is_fp8_block_scaling_available(cls):
            return False, "too old"

    old = types.ModuleType("transformer_engine.pytorch.fp8")
    old.FP8GlobalStateManager = FP8GlobalStateManager
    monkeypatch.setitem(sys.modules, old.__name__, old)
    cuda, version = gpu()
    with cuda, version:
        assert why_not_te(Block()).endswith("refuses recipe 'block' on NVIDIA H200 (SM90): too old")
    weight, expected = parameter(32, 48), parameter(32, 48)
    with pytest.warns(DeprecationWarning, match="fp8_autocast"):  # so says the fake, which has both
        found = run_linear(TEBackend(Block()).linear(), weight)
    want = run_linear(EmulateBackend(Block()).linear(), expected)
    assert_same([*found, weight.grad], [*want, expected.grad])


def test_without_the_package_or_a_device(monkeypatch):
    assert "needs a CUDA device" in why_not_te(Block())
    monkeypatch.setattr(te_backend, "why_not_te", why_not_te)
    with pytest.raises(ConfigurationError, match="needs a CUDA device, and torch sees none here"):
        TEBackend(Block())
    monkeypatch.setattr(te_backend, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lightning-dualpipe\[te\]'"):
        TEBackend(Block())
