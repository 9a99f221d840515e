"""What torch is asked to multiply: checked, on any machine, by a ``scaled_mm`` that takes what cuBLAS takes."""

import copy
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision import reference, torch_backend
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.recipe import Block, Current, Operand
from lightning_dualpipe.precision.reference import Quantised, quantise
from lightning_dualpipe.precision.torch_backend import TorchBackend, why_not_torch
from tests.precision.test_te_backend import gpu, normal, parameter, queue_that, run_grouped, run_linear

RECIPES = [Block(), Block("float32")]


def scaled_mm(
    mat_a,
    mat_b,
    scale_a,
    scale_recipe_a,
    scale_b,
    scale_recipe_b,
    swizzle_a=None,
    swizzle_b=None,
    bias=None,
    output_dtype=torch.bfloat16,
    contraction_dim=(),
    use_fast_accum=False,
):
    """The rules of ``ScaledBlas.cpp`` for SM90, one by one, and the definition's product."""
    (m, k), (k2, n) = mat_a.shape, mat_b.shape
    assert k == k2 and min(m, n, k) > 0
    assert mat_a.stride() == (k, 1) and mat_b.stride() == (1, k), "row-major times column-major"
    assert mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn
    assert k % 16 == 0 and n % 16 == 0 and m % 4 == 0
    assert output_dtype in (torch.bfloat16, torch.float32) and not use_fast_accum and bias is None
    assert mat_a.data_ptr() % 16 == 0 and mat_b.data_ptr() % 16 == 0
    wide, square = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    assert (scale_recipe_a, scale_recipe_b) in ((wide, wide), (wide, square), (square, wide))

    def matrix(values_MK, scale, kind):
        outer, tiles = len(values_MK), -(-k // 128)
        assert scale.dtype == torch.float32 and scale.data_ptr() % 16 == 0
        if kind is wide:
            assert scale.shape == (outer, tiles), (scale.shape, outer, tiles)
            assert scale.stride(0) == 1 and (scale.stride(1) == outer or (tiles == 1 and scale.stride(1) == 1))
            return Quantised(values_MK, scale, (1, 128))
        padded = -(-tiles // 4) * 4
        assert scale.shape == (padded, -(-outer // 128)), (scale.shape, outer, tiles)
        assert scale.stride(0) == 1 and (scale.stride(1) == padded or (scale.shape[1] == 1 and scale.stride(1) == 1))
        return Quantised(values_MK, scale[:tiles].mT, (128, 128))

    a, b = matrix(mat_a, scale_a, scale_recipe_a), matrix(mat_b.mT, scale_b, scale_recipe_b)
    return reference.multiply(a, b, output_dtype)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch_backend.F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(torch_backend, "why_not_torch", lambda recipe: None)


REAL = F.scaled_mm


def test_the_arguments_are_those_of_torch():
    assert list(inspect.signature(scaled_mm).parameters) == list(inspect.signature(REAL).parameters)


@pytest.mark.parametrize("scales", ["power_of_two", "float32"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(16, 16, 16), (128, 128, 128), (1, 3, 5), (130, 200, 260), (257, 129, 640), (4, 576, 72)]
)
@pytest.mark.parametrize("tiles", [((1, 128), (1, 128)), ((1, 128), (128, 128)), ((128, 128), (1, 128))], ids=str)
def test_products_of_any_size_are_those_of_the_definition(tiles, m, n, k, scales):
    """1e-6: padding may change the order of additions."""
    a = quantise(normal(m, k), Operand("e4m3", tiles[0], scales))
    b = quantise(normal(n, k, seed=1), Operand("e4m3", tiles[1], scales))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got, want = torch_backend.multiply(a, b, dtype), reference.multiply(a, b, dtype)
        assert got.dtype == dtype and got.shape == (m, n)
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.parametrize("shape", [(0, 16, 16), (16, 0, 16), (16, 16, 0)], ids=str)
def test_nothing_times_something(shape):
    m, n, k = shape
    how = Operand("e4m3", (1, 128))
    product = torch_backend.multiply(quantise(normal(m, k), how), quantise(normal(n, k), how), torch.bfloat16)
    assert product.shape == (m, n) and not product.any() and product.dtype == torch.bfloat16


def test_what_no_kernel_multiplies():
    square = quantise(normal(128, 128), Operand("e4m3", (128, 128)))
    with pytest.raises(AssertionError, match="no kernel multiplies tiles"):
        torch_backend.multiply(square, square)
    with pytest.raises(ConfigurationError, match="use backend='emulate'"):
        torch_backend.multiply(square, square, torch.float64)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("deferring", [False, True])
def test_a_linear_layer_is_that_of_the_definition(recipe, deferring):
    ours, theirs = parameter(96, 160), parameter(96, 160)
    found = run_linear(TorchBackend(recipe).linear(), ours, microbatches=2, queue=queue_that(deferring), rows=70)
    want = run_linear(EmulateBackend(recipe).linear(), theirs, microbatches=2, rows=70)
    for got, expected in zip([*found, ours.grad], [*want, theirs.grad], strict=True):
        assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_experts_are_those_of_the_definition(recipe):
    ours, theirs = parameter(4, 96, 160), parameter(4, 96, 160)
    counts = [33, 0, 5, 16]
    found = run_grouped(TorchBackend(recipe).grouped_linear(), ours, counts, microbatches=2, queue=queue_that(True))
    want = run_grouped(EmulateBackend(recipe).grouped_linear(), theirs, counts, microbatches=2)
    for got, expected in zip([*found, ours.grad], [*want, theirs.grad], strict=True):
        assert (got - expected).norm() < 1e-6 * expected.norm()


def test_a_weight_is_turned_once_in_a_step(monkeypatch):
    backend, weight, turned = TorchBackend(Block()), parameter(32, 48), []
    real = torch_backend._turned
    monkeypatch.setattr(torch_backend, "_turned", lambda x: turned.append(1) or real(x))
    matmul = backend.linear()
    run_linear(matmul, weight, microbatches=3)
    assert len(turned) == 1
    with torch.no_grad():
        weight.mul_(2)
    run_linear(matmul, weight)
    assert len(turned) == 2
    backend.weights_changed()
    run_linear(matmul, weight)
    assert len(turned) == 3


def test_a_copy_of_a_layer_keeps_its_own_weight():
    layer = nn.Module()
    layer.matmul = TorchBackend(Block()).linear()
    weight = parameter(32, 48)
    run_linear(layer.matmul, weight)
    clone, other = copy.deepcopy(layer).matmul, nn.Parameter(2 * weight.detach())
    found, want = run_linear(clone, other), run_linear(EmulateBackend(Block()).linear(), other)
    assert torch.allclose(found[0], want[0])


@pytest.mark.parametrize(
    ("recipe", "machine", "words"),
    [
        (Block(), {}, None),
        (Current(), {}, "recipe 'block' only, not those of 'current'; use backend='te'"),
        (Block(), {"capability": (10, 0), "name": "B200"}, r"on Hopper \(SM90\) only, and this is B200 \(SM100\)"),
        (Block(), {"capability": (8, 0), "name": "A100"}, "recipe='bf16'"),
        (Block(), {"cuda": "12.6"}, "CUDA 12.9 or newer, and this one is for 12.6"),
    ],
)
def test_what_is_missing_is_said(recipe, machine, words):
    cuda, version = gpu(**machine)
    with cuda, version:
        refused = why_not_torch(recipe)
    assert refused is None if words is None else re.search(words, refused), refused


def test_without_a_device_it_cannot_be_made(monkeypatch):
    monkeypatch.setattr(torch_backend, "why_not_torch", why_not_torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="on CUDA devices only, and sees none here"):
        TorchBackend(Block())
