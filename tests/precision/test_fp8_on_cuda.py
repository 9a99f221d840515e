"""What only a GPU can tell: that kernels compute what the definition says, and that nothing piles up.

The definition (``emulate``) runs on the same GPU, in plain torch.
"""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_dualpipe
from lightning_dualpipe import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.deepseek_v3.init import initialize
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.convert import convert
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from lightning_dualpipe.precision.recipe import MXFP8, Block, Current, Operand, Recipe
from lightning_dualpipe.precision.reference import quantise
from lightning_dualpipe.precision.te_backend import TEBackend, why_not_te
from lightning_dualpipe.precision.torch_backend import TorchBackend, why_not_torch
from tests.marks import needs_cuda, needs_te

pytestmark = needs_cuda
DEVICE = "cuda"
BF16 = torch.bfloat16
EVERY = ["te", "torch"]
RECIPES = [Block(), Block("float32"), Current(), MXFP8()]
COUNTS = [[64, 0, 128, 64], [0, 0, 256, 0], [50, 78, 63, 1], [0, 0, 0, 0]]


def backend(name: str, recipe: Recipe):
    """Skips where this machine cannot."""
    why_not, kind = {"te": (why_not_te, TEBackend), "torch": (why_not_torch, TorchBackend)}[name]
    if (refused := why_not(recipe)) is not None:
        pytest.skip(refused)
    return kind(recipe)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm())


def run(matmul, weight, *arguments, rows: int, microbatches: int = 1, queue: WeightGradients | None = None):
    """Outputs and gradients of inputs, then the weight's."""
    found = []
    for index in range(microbatches):
        x = normal(rows, weight.shape[-1], seed=10 + index).requires_grad_()
        y = matmul(x, weight, *arguments, queue)
        y.backward(normal(*y.shape, seed=20 + index))
        found += [y.detach(), x.grad]
    if queue is not None:
        queue.run(len(queue))
    return [*found, weight.grad]


def queue_that(deferring: bool) -> WeightGradients:
    queue = WeightGradients()
    queue.deferring = deferring
    return queue


def parameter(*shape: int) -> nn.Parameter:
    weight = nn.Parameter(normal(*shape, seed=1) * 0.02)
    keep_main_gradients([weight])
    return weight


# ---- the quantiser ----------------------------------------------------------------------------


@needs_te
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("scales", ["power_of_two", "float32"])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("shape", [(384, 640), (256, 128), (48, 144), (400, 80)], ids=str)
def test_bytes_and_scales_of_the_quantiser_are_those_of_the_definition(shape, dim, scales, dtype):
    backend("te", Block(scales))  # or skip
    import transformer_engine.pytorch  # noqa: F401  (loads the libraries)
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    m, k = shape
    x = normal(m, k, dtype=torch.float32) * torch.exp(3 * normal(m, 1, seed=2, dtype=torch.float32))
    x[5], x[6, :8], x[7, 0] = 0, 1e-30, 3e38
    x = x.to(dtype)
    quantiser = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=True,
        force_pow_2_scales=scales == "power_of_two",
        block_scaling_dim=dim,
    )
    theirs = quantiser(x)
    how = Operand("e4m3", (1, 128) if dim == 1 else (128, 128), scales)
    both = (
        (quantise(x, how), theirs._rowwise_data, theirs._rowwise_scale_inv),
        (quantise(x.mT, how), theirs._columnwise_data, theirs._columnwise_scale_inv),
    )
    for ours, data, inverse in both:
        assert torch.equal(ours.values_MK.contiguous().view(torch.uint8), data.view(torch.uint8))
        expected = ours.inverse_scales
        laid_out = inverse.mT if dim == 1 else inverse  # [K / 128, M]; either way padded
        assert torch.equal(expected, laid_out[: expected.shape[0], : expected.shape[1]])


# ---- products ---------------------------------------------------------------------------------


LAYERS = [  # rows, outputs, inputs; MXFP8 takes multiples of 32 only
    (recipe, *sizes)
    for recipe in RECIPES
    for sizes in [(256, 384, 512), (100, 576, 1536), (16, 128, 128), (8, 48, 80)]
    if not (isinstance(recipe, MXFP8) and (sizes[1] % 32 or sizes[2] % 32))
]


@pytest.mark.parametrize(("recipe", "rows", "outputs", "inputs"), LAYERS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_linear_layer_is_that_of_the_definition(rows, outputs, inputs, name, recipe):
    """4e-3: all are rounded to bfloat16 at the end. Per tensor, Transformer Engine's forward sums in fewer bits."""
    tolerance = 1e-2 if isinstance(recipe, Current) else 4e-3
    ours, theirs = parameter(outputs, inputs), parameter(outputs, inputs)
    matmul = backend(name, recipe).linear()
    found = run(matmul, ours, None, rows=rows, microbatches=2, queue=queue_that(False))
    want = run(EmulateBackend(recipe).linear(), theirs, None, rows=rows, microbatches=2)
    for got, expected in zip(found, want, strict=True):
        assert got.dtype == expected.dtype and error(got, expected) < tolerance


@pytest.mark.parametrize("name", EVERY)
def test_errors_are_those_of_the_recipe(name):
    """Relative to float32, of normal numbers: 0.0374, 0.0375 and 0.0376 forward, of inputs and of weights."""
    weight = parameter(512, 1024)
    y, grad_x, grad_weight = run(backend(name, Block()).linear(), weight, None, rows=1024, queue=queue_that(False))
    x, grad = normal(1024, 1024, seed=10).float(), normal(1024, 512, seed=20).float()
    w = weight.detach().float()
    for got, exact in ((y, x @ w.T), (grad_x, grad @ w), (grad_weight, grad.T @ x)):
        assert 0.0355 < error(got, exact) < 0.0395


@pytest.mark.parametrize("form", ["list", "cpu", "cuda"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_experts_are_those_of_the_definition(name, counts, form):
    ours, theirs = parameter(4, 384, 512), parameter(4, 384, 512)
    given = counts if form == "list" else torch.tensor(counts, device=form)
    matmul, rows = backend(name, Block()).grouped_linear(), sum(counts)
    found = run(matmul, ours, given, rows=rows, microbatches=2, queue=queue_that(True))
    want = run(EmulateBackend(Block()).grouped_linear(), theirs, counts, rows=rows, microbatches=2)
    for got, expected in zip(found, want, strict=True):
        assert got.shape == expected.shape and (not expected.any() or error(got, expected) < 4e-3)
    for expert, count in enumerate(counts):
        assert bool(ours.grad[expert].any()) is (count > 0)


@pytest.mark.parametrize("kind", ["linear", "grouped_linear"])
@pytest.mark.parametrize("name", EVERY)
def test_deferred_weight_gradients_are_immediate_ones(name, kind):
    found = []
    for deferring in (False, True):
        grouped = kind == "grouped_linear"
        weight = parameter(4, 384, 512) if grouped else parameter(384, 512)
        queue, matmul = queue_that(deferring), getattr(backend(name, Block()), kind)()
        found.append(run(matmul, weight, COUNTS[0] if grouped else None, rows=256, microbatches=4, queue=queue))
    for at_once, later in zip(*found, strict=True):
        assert error(later, at_once) < 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_without_a_queue_gradients_go_through_autograd(name):
    """DDP and plain optimizers: in the parameter's own number format."""
    weight = nn.Parameter(normal(384, 512, seed=1))
    matmul = backend(name, Block()).linear()
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    run(matmul, weight, None, rows=64, microbatches=2)
    theirs = nn.Parameter(weight.detach().clone())
    run(EmulateBackend(Block()).linear(), theirs, None, rows=64, microbatches=2)
    assert seen == [BF16] * 2 and error(weight.grad, theirs.grad) < 8e-3


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_quantised_anew_after_a_step_of_a_fused_optimizer(name):
    """It counts no version of what it changes."""
    weight = nn.Parameter(normal(384, 512, seed=1))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    matmul = backend(name, Block()).linear()
    x = normal(64, 512).requires_grad_()
    for _ in range(3):
        y = matmul(x, weight, None, None)
        assert error(y, EmulateBackend(Block()).linear()(x, weight, None, None)) < 4e-3
        y.float().square().mean().backward()
        with torch.no_grad():
            assert error(matmul(x, weight, None, None), y) < 4e-3
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", EVERY)
def test_under_autocast_weights_stay_float32(name):
    weight = nn.Parameter(normal(384, 512, seed=1, dtype=torch.float32))
    theirs = nn.Parameter(weight.detach().clone())
    found = []
    for matmul, each in ((backend(name, Block()).linear(), weight), (EmulateBackend(Block()).linear(), theirs)):
        x = normal(64, 512, dtype=torch.float32).requires_grad_()
        with torch.autocast(DEVICE, BF16):
            y = matmul(x, each, None, None)
        y.backward(torch.ones_like(y))
        found.append((y, x.grad, each.grad))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype and error(got, want) < 4e-3


# ---- over many steps --------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_memory_does_not_grow_in_200_steps(name):
    model = nn.Sequential(nn.Linear(512, 384, bias=False), nn.GELU(), nn.Linear(384, 512)).to(DEVICE, BF16)
    experts = Experts(4, 512, 128).to(DEVICE, BF16)
    initialize(experts, seed=0, std=0.02)
    made, queue = backend(name, Block()), queue_that(True)
    whole = nn.ModuleList([model, experts])
    assert len(convert(whole, made, lambda name, layer: True)) == 3
    experts.weight_gradients = queue
    keep_main_gradients(experts.parameters())
    used = []
    for step in range(200):
        for microbatch in range(2):
            x = normal(256, 512, seed=microbatch).requires_grad_()
            counts = torch.tensor([[64, 0, 128, 64], [1, 99, 100, 56], [256, 0, 0, 0]][step % 3])
            experts(model(x), torch.ones(256, device=DEVICE), counts).float().square().mean().backward()
        queue.run(len(queue))
        for each in whole.parameters():
            each.grad = None
        made.weights_changed()
        gc.collect()
        used.append(torch.cuda.memory_allocated() if DEVICE == "cuda" else 0)
    assert max(used[100:]) <= max(used[:100])


SIZES = {
    "vocab_size": 256,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
STEPS = 200, 100  # before there are two ways, and on each of them


def test_a_loss_is_within_a_quarter_percent_of_that_without_fp8():
    """The report's claim (section 3.3): a trained model goes on with FP8 and without, over the same text."""
    made = backend("te" if why_not_te(Block()) is None else "torch", Block())
    torch.manual_seed(0)
    model = Transformer(DeepSeekV3Config.from_preset("tiny", **SIZES)).to(DEVICE)
    initialize(model, seed=0, std=0.02)
    text = b"".join(path.read_bytes() for path in sorted(Path(lightning_dualpipe.__file__).parent.rglob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(DEVICE, torch.int64)
    before, then = STEPS
    train(model, tokens, range(before))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    without = train(model, tokens, range(before, before + then))
    model.load_state_dict(start)
    assert len(convert(model, made, lambda name, layer: not name.endswith("lm_head"))) >= 3 * 7
    made.weights_changed()
    found = train(model, tokens, range(before, before + then))
    relative = (found - without) / without
    assert relative.abs().max() > 0, "FP8 was never reached"
    assert abs(float(relative.mean())) < 0.0025 and float(without[-10:].mean()) < 3.0


def train(model: nn.Module, tokens: Tensor, steps: range) -> Tensor:
    """The losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(tokens) - 129, (16, 1), generator=generator).to(DEVICE)
        batch = tokens[starts + torch.arange(129, device=DEVICE)]
        with torch.autocast(DEVICE, BF16):
            loss = model({"input_ids": batch[:, :-1], "labels": batch[:, 1:]})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).float()
