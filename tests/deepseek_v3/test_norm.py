"""RMSNorm and SwiGLU: values and written-out backwards against plain autograd."""

import pytest
import torch
import torch.nn.functional as F

from lightning_dualpipe.deepseek_v3.norm import RMSNorm
from lightning_dualpipe.deepseek_v3.swiglu import swiglu, weighted_swiglu
from tests.oracles import deepseek_v3 as oracle

SHAPES = [(7,), (3, 7), (2, 5, 7), (0, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_its_gradients_are_those_of_the_definition(shape):
    norm = RMSNorm(7, eps=0.1).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)

    got = torch.autograd.grad(norm(x), (x, norm.weight), g)
    want = torch.autograd.grad(oracle.rms_norm(x, norm.weight, 0.1), (x, norm.weight), g)

    torch.testing.assert_close(norm(x), oracle.rms_norm(x, norm.weight, 0.1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_norm_in_bfloat16_takes_float32_statistics_and_rounds_before_the_weight():
    norm = RMSNorm(64, eps=1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(9, 64) * 100).bfloat16()
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()

    torch.testing.assert_close(norm(x), norm.weight * normed, rtol=0, atol=0)
    # float32 weights of a model under autocast keep their precision
    assert RMSNorm(64, eps=1e-6)(x).dtype == torch.float32


def test_norm_gradients_in_bfloat16_are_those_of_float32_up_to_rounding():
    norm = RMSNorm(64, eps=1e-6)
    x, g = torch.randn(50, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    wide = x.float().requires_grad_()
    want = torch.autograd.grad(norm(wide), (wide, norm.weight), g.float())

    x.requires_grad_()
    half = norm.bfloat16()
    got = torch.autograd.grad(half(x), (x, half.weight), g)
    # 2^-8 is the spacing of bfloat16; sums over rows are taken in float32 and rounded once
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("rows", [0, 1, 3, 5000])
def test_swiglu_and_its_gradients_are_those_of_autograd(rows):
    """5000 rows of 60 are more than one piece."""
    gate, up, g = torch.randn(3, rows, 60, dtype=torch.float64)
    gate.requires_grad_(), up.requires_grad_()

    got = swiglu(gate, up)
    want = F.silu(gate) * up
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    inputs = gate, up
    got_grads, want_grads = (torch.autograd.grad(y, inputs, g) for y in (got, want))
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [0, 1, 3, 5000])
def test_weighted_swiglu_and_its_gradients_are_those_of_autograd(rows):
    gate_up = torch.randn(rows, 120, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    g = torch.randn(rows, 60, dtype=torch.float64)

    got = weighted_swiglu(gate_up, weights)
    want = F.silu(gate_up[:, :60]) * gate_up[:, 60:] * weights[:, None]
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    inputs = gate_up, weights
    got_grads, want_grads = (torch.autograd.grad(y, inputs, g) for y in (got, want))
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-12, atol=1e-12)


def test_bfloat16_rows_take_float32_weights():
    gate_up = torch.randn(6, 8).bfloat16().requires_grad_()
    weights = torch.rand(6, requires_grad=True)

    y = weighted_swiglu(gate_up, weights)
    y.sum().backward()

    assert (y.dtype, gate_up.grad.dtype, weights.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    want = F.silu(gate_up[:, :4].float()) * gate_up[:, 4:].float() * weights[:, None]
    torch.testing.assert_close(y.float(), want, rtol=2**-6, atol=2**-7)  # three roundings of 2^-9 each
