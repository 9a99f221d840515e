"""Tokens on the FP8 grid: what rounding is, and that what is rounded travels without a loss."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.row_format import from_bytes, to_bytes
from lightning_dualpipe.planner.estimate import _SCALES
from lightning_dualpipe.precision.fp8_rows import FP8Rows, round_expert_tokens, travels_exactly
from lightning_dualpipe.precision.recipe import BF16, MXFP8, Block, Current, Delayed

BLOCK, MX = FP8Rows(Block().activation), FP8Rows(MXFP8().activation)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def there_and_back(rows, x):
    values, scales = rows.encode(x)
    values, scales = from_bytes(to_bytes(values, scales), x.shape[1], values.dtype)
    return rows.decode(values, scales, x.dtype)


def same_bits(a, b):
    """The sign of a zero is a bit; a NaN is a NaN."""
    bits = INTEGER[a.itemsize]
    return a.dtype == b.dtype and bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def hard_rows(width, dtype):
    """Random rows of all magnitudes that the type has, and every special case beside ordinary numbers."""
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(400, width, generator=generator, dtype=torch.float64)
    exponents = torch.linspace(-150, 127, 400, dtype=torch.float64)
    within_a_row = torch.randint(-20, 1, (400, width), generator=generator).double()
    x = (normal * 2 ** exponents[:, None] * 2**within_a_row).to(dtype)
    info = torch.finfo(dtype)
    small = info.tiny * info.eps
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny, small, 3 * small, 448.0, 2**-9]
    hard = torch.randn(3 * len(special), width, generator=generator, dtype=torch.float64).to(dtype)
    for index, value in enumerate(special):
        hard[3 * index] = value
        hard[3 * index + 1, width // 2] = value
        hard[3 * index + 2, ::3] = value
    return torch.cat([x, hard, torch.zeros(1, width, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 32, 127, 128, 129, 300])
@pytest.mark.parametrize("rows", [BLOCK, MX], ids=["1x128", "1x32"])
def test_what_is_rounded_travels_without_a_loss(rows, width, dtype):
    x = hard_rows(width, dtype)
    rounded = rows.round(x)
    assert same_bits(there_and_back(rows, rounded), rounded)
    assert same_bits(rows.round(rounded), rounded)
    assert rounded.isnan().equal(x.isnan()) and not rounded.isinf().any()
    assert not same_bits(rounded, x), "rounding that changes nothing would prove nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_value_of_the_grid_travels_alone_and_beside_a_largest_one(dtype):
    """256 values, 249 exponents of a scale. Where the type has fewer bits left (denormals), rounding says what is."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    scales = 2.0 ** torch.arange(-127, 122, dtype=torch.float64)
    alone = (scales[:, None] * values).to(dtype).view(-1, 1)
    beside = torch.cat([alone, (scales * 448).to(dtype).repeat_interleave(len(values))[:, None]], dim=1)
    for x in (alone, beside):
        x = BLOCK.round(x[x.isfinite().all(1)])
        assert len(x) > 60_000 and same_bits(there_and_back(BLOCK, x), x)
    wide = alone[(alone.abs() >= torch.finfo(dtype).tiny * 2**8).all(1) & alone.isfinite().all(1)]
    assert len(wide) > 50_000 and same_bits(BLOCK.round(wide), wide)


def test_rounding_takes_the_nearest_value_of_the_grid():
    """By a search through all values, in float64. Ties are for the tests of ``reference``; here are none."""
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    for start in range(0, 300, 128):
        tile = x[:, start : start + 128].double()
        scale = 2 ** (448 / tile.abs().amax(1, keepdim=True)).log2().floor()
        nearest = ((tile * scale).abs()[..., None] - table).abs().argmin(-1)
        want = table[nearest] * tile.sign() / scale
        assert torch.equal(BLOCK.round(x)[:, start : start + 128].double(), want)


def test_the_gradient_of_rounding_passes_and_a_rounded_gradient_leaves_values_alone():
    x, g = (torch.randn(7, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = BLOCK.round(one), BLOCK.round_gradient(other)
    y.backward(g)
    z.backward(g)
    assert torch.equal(one.grad, g) and torch.equal(other.grad, BLOCK.round(g)) and not torch.equal(other.grad, g)
    assert torch.equal(y, BLOCK.round(x)) and torch.equal(z, x) and not torch.equal(y, x)


@pytest.mark.parametrize("width", [1, 300])
def test_no_rows_are_no_case_of_their_own(width):
    x = torch.empty(0, width)
    assert BLOCK.round(x).shape == there_and_back(BLOCK, x).shape == (0, width)


def test_a_row_in_fp8_is_half_of_one_in_bf16():
    """DeepSeek-V3's width: a byte for each value and for each 128 of them; DeepEP's scales are four bytes."""
    x = torch.zeros(3, 7168, dtype=torch.bfloat16)
    values, scales = BLOCK.encode(x)
    assert to_bytes(values, scales).nbytes == 3 * (7168 + 56)
    assert to_bytes(values, scales).nbytes / x.nbytes == pytest.approx(0.5039, abs=1e-4)
    assert values.nbytes + scales.nbytes == 3 * 7168 * (1 + _SCALES), "what the planner counts"


def test_nothing_makes_the_host_wait():
    """Tensors without numbers: whoever wanted to see one would raise."""
    with FakeTensorMode():
        x = torch.empty(5, 300, dtype=torch.bfloat16)
        assert there_and_back(BLOCK, BLOCK.round(x)).shape == (5, 300)
        with pytest.raises(RuntimeError):
            x[0, 0].item()


class Sender(nn.Module):
    rows = "untouched"

    def use_token_format(self, rows):
        self.rows = rows


def test_all_mixtures_of_a_model_are_switched_on_and_off():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Sender(), nn.ReLU()), Sender())
    senders = [model[1][0], model[2]]
    assert round_expert_tokens(model, Block()) == ["1.0", "2"] and all(each.rows == BLOCK for each in senders)
    assert round_expert_tokens(model, MXFP8()) == ["1.0", "2"] and all(each.rows == MX for each in senders)
    for off in (None, BF16()):
        round_expert_tokens(model, Block())
        assert round_expert_tokens(model, off) == ["1.0", "2"] and all(each.rows is None for each in senders)


@pytest.mark.parametrize("recipe", [Block(scales="float32"), Current(), Delayed()], ids=repr)
def test_what_would_lose_something_on_the_way_is_refused(recipe):
    model = nn.Sequential(Sender())
    with pytest.raises(ConfigurationError, match=r"cannot travel in FP8 with float32 scales of .*; use recipe='block'"):
        round_expert_tokens(model, recipe)
    assert model[0].rows == "untouched" and not travels_exactly(recipe)


@pytest.mark.parametrize("recipe", [Block(), MXFP8()], ids=repr)
def test_recipes_whose_scales_are_powers_of_two_are_taken(recipe):
    assert travels_exactly(recipe) and not travels_exactly(BF16())
    round_expert_tokens(nn.Sequential(Sender()), recipe)
