"""The definition against numbers computed by hand, and against plain Python (``tests.oracles.fp8``), byte by byte."""

import math

import pytest
import torch

from lightning_dualpipe.precision.recipe import MXFP8, Block, Current, Operand
from lightning_dualpipe.precision.reference import (
    FORMATS,
    Quantised,
    dequantise,
    forward,
    grad_input,
    grad_weight,
    multiply,
    multiply_tile_by_tile,
    quantise,
    round_to_grid,
)
from tests.oracles import fp8

INF, NAN = math.inf, math.nan
FLOAT32, POWER_OF_TWO = "float32", "power_of_two"
TILES = [(1, 128), (128, 128), (1, 32), None]


def codes(x: Quantised) -> list[list[int]]:
    return x.values_MK.view(torch.uint8).tolist()


# ---- the oracle, held against what the formats are defined to be -----------------------------------


def test_the_oracle_knows_the_formats():
    """Micikevicius et al., FP8 Formats for Deep Learning, table 1."""
    e4m3 = [fp8.value_of(code, "e4m3") for code in range(256)]
    e5m2 = [fp8.value_of(code, "e5m2") for code in range(256)]
    assert (max(x for x in e4m3 if x == x), max(x for x in e5m2 if x < INF)) == (448, 57344)
    assert (min(x for x in e4m3 if x > 0), min(x for x in e5m2 if x > 0)) == (2**-9, 2**-16)
    assert (fp8.value_of(0x08, "e4m3"), fp8.value_of(0x04, "e5m2")) == (2**-6, 2**-14)  # smallest normal ones
    assert (sum(x != x for x in e4m3), sum(x != x for x in e5m2)) == (2, 6)
    assert (e4m3.count(INF), e5m2.count(INF), e5m2.count(-INF)) == (0, 1, 1)
    for format, dtype in FORMATS.items():
        theirs = torch.arange(256, dtype=torch.uint8).view(dtype).double()
        ours = torch.tensor([fp8.value_of(code, format) for code in range(256)], dtype=torch.float64)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)


# ---- by hand --------------------------------------------------------------------------------------

# format, scales, row -> values that are kept, inverse scale
BY_HAND = {
    # 448 / 3 = 149.33, rounded down to a power of two 128
    "a power of two": ("e4m3", POWER_OF_TWO, [1.0, 2.0, -3.0], [128, 256, -384], 2**-7),
    # 149.33: between 144 and 160; 298.67: between 288 and 320
    "a float32 scale": ("e4m3", FLOAT32, [1.0, 2.0, -3.0], [144, 288, -448], 3 / 448),
    # 57344 / 3 = 19114.67, that is 16384; in steps of 4096 there
    "E5M2": ("e5m2", POWER_OF_TWO, [1.0, 2.0, -3.0], [16384, 32768, -49152], 2**-14),
    "ties go to the even one": ("e4m3", FLOAT32, [448.0, 17.0, 19.0, -21.0, 0.001953125 / 2], [448, 16, 20, -20, 0], 1),
    "beyond a tie": ("e4m3", FLOAT32, [448.0, 17.001, 18.999], [448, 18, 18], 1),
    "small numbers lose bits, then all": (
        "e4m3",
        FLOAT32,
        [448.0, 2**-9, 3 * 2**-10, 2**-10, 1.001 * 2**-10],
        [448, 2**-9, 2 * 2**-9, 0, 2**-9],
        1,
    ),
    "zeros have the scale 1": ("e4m3", FLOAT32, [0.0, -0.0], [0.0, -0.0], 1),
    "infinity becomes the largest, with the scale 1": (
        "e4m3",
        FLOAT32,
        [INF, -INF, 3.0, 500.0],
        [448, -448, 3, 448],
        1,
    ),
    "infinity in E5M2 too": ("e5m2", POWER_OF_TWO, [INF, -INF, 3.0], [57344, -57344, 3], 1),
    "NaN stays, and has no say in the scale": ("e4m3", POWER_OF_TWO, [NAN, 1.0, -3.0], [NAN, 128, -384], 2**-7),
    "nothing but NaN": ("e4m3", FLOAT32, [NAN, NAN], [NAN, NAN], 1),
    "NaN beside infinity": ("e4m3", FLOAT32, [NAN, INF, 1.0], [NAN, 448, 1], 1),
    # 448 / 1e-38 is beyond float32: the scale is its largest, so the value is 1e-38 * 3.4028235e38 = 3.4028
    "a tiny number": ("e4m3", FLOAT32, [1e-38], [3.5], 1 / fp8.FLOAT32_MAX),
    "a tiny number by a power of two": ("e4m3", POWER_OF_TWO, [1e-38], [1.75], 2**-127),
    "a denormal one": ("e4m3", POWER_OF_TWO, [2.0**-149, 2.0**-130], [0.0, 0.125], 2**-127),
    "the largest of float32": ("e4m3", POWER_OF_TWO, [fp8.FLOAT32_MAX, 2.0**127], [256, 128], 2**120),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    format, scales, row, kept, inverse = BY_HAND[case]
    got = quantise(torch.tensor([row]), Operand(format, (1, 128), scales))
    expected = torch.tensor([kept], dtype=torch.float32)
    torch.testing.assert_close(got.values_MK.float(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.values_MK.float().signbit(), expected.signbit())
    assert got.inverse_scales.shape == (1, 1) and got.inverse_scales.item() == pytest.approx(inverse, rel=2**-23, abs=0)
    assert got.inverse_scales.dtype == torch.float32 and got.values_MK.dtype == FORMATS[format]


def test_a_scale_beyond_float32_is_the_largest_number_of_a_bfloat16_tensor():
    """What Transformer Engine's kernels take: the largest number of the input's type."""
    got = quantise(torch.tensor([[1e-38]], dtype=torch.bfloat16), Operand("e4m3", (1, 128), FLOAT32))
    assert got.inverse_scales.item() == (1 / torch.tensor(0x7F7F0000, dtype=torch.int32).view(torch.float32)).item()


def test_the_scale_is_a_quotient_and_no_product_with_a_reciprocal():
    """torch computes ``448 / tensor`` as ``tensor.reciprocal() * 448``, which is off in the last place for a quarter
    of all numbers; a value that lies in the middle between two then goes the other way.
    """
    x = torch.tensor([[3.0, 2.25]])  # 2.25 * 448 / 3 = 336, between 320, which is even, and 352
    quotient, product = float.fromhex("0x1.2aaaaap+7"), float.fromhex("0x1.2aaaacp+7")
    assert (448.0 / x[:, :1]).item() == product, "if torch divides by now, the trap is gone"
    assert (x * product).to(torch.float8_e4m3fn).tolist() == [[448, 352]]

    got = quantise(x, Operand("e4m3", None, FLOAT32))
    assert got.values_MK.tolist() == [[448, 320]]
    assert got.inverse_scales.item() == torch.tensor(quotient).reciprocal().item()


def test_each_tile_has_its_own_scale_and_edges_are_tiles_too():
    x_MK = torch.zeros(3, 130)
    x_MK[0, 0], x_MK[0, 129], x_MK[1, 127], x_MK[2, 128] = 7.0, 0.875, 1.75, 3.5
    got = quantise(x_MK, Operand("e4m3", (1, 128), POWER_OF_TWO))
    assert got.inverse_scales.tolist() == [[2**-6, 2**-9], [2**-8, 1.0], [1.0, 2**-7]]
    got = quantise(x_MK, Operand("e4m3", (128, 128), POWER_OF_TWO))
    assert got.inverse_scales.tolist() == [[2**-6, 2**-7]]
    assert got.values_MK[0, 0] == 448 and got.values_MK[1, 127] == 112 and got.values_MK[0, 129] == 112
    assert quantise(x_MK, Operand("e4m3", None, POWER_OF_TWO)).inverse_scales.tolist() == [[2**-6]]


# ---- against plain Python -------------------------------------------------------------------------


def numbers(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "of all sizes":  # every binade of float32, denormals included
        x = x.sign() * torch.exp2(torch.empty_like(x).uniform_(-149, 127.9))
    if kind == "special":
        x[torch.rand(shape) < 0.1] = 0.0
        x[torch.rand(shape) < 0.01] = NAN
        x[torch.rand(shape) < 0.005] = INF
        x[torch.rand(shape) < 0.005] = -INF
        x[: shape[0] // 3] = 0.0
        x[-1] = NAN
    if kind == "on the grid and between":
        values = torch.tensor([fp8.value_of(code, "e4m3") for code in range(0x7F)], dtype=torch.float64)
        between = torch.cat((values, (values[1:] + values[:-1]) / 2))
        x = between[torch.randint(len(between), shape)] * x.sign()
        x[:, ::32] = 448.0  # so that the scale is 1
    return x


@pytest.mark.parametrize("kind", ["normal", "of all sizes", "special", "on the grid and between"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("scales", [POWER_OF_TWO, FLOAT32])
@pytest.mark.parametrize("format", FORMATS)
def test_every_byte_and_scale_is_that_of_plain_python(format, scales, tile, kind):
    dtypes = [torch.float32, torch.bfloat16] if kind != "normal" else [torch.float32, torch.bfloat16, torch.float64]
    for dtype in dtypes:
        for shape in ((5, 150), (3, 32)):  # with ragged edges, and smaller than a tile
            x_MK = numbers(kind, shape).to(dtype)
            got = quantise(x_MK, Operand(format, tile, scales))
            beyond = torch.finfo(torch.bfloat16).max if dtype == torch.bfloat16 else fp8.FLOAT32_MAX
            values, inverses = fp8.quantise(
                x_MK.float().tolist(), format, tile, power_of_two=scales == POWER_OF_TWO, beyond=beyond
            )
            assert without_signs_of_nan(codes(got), format) == without_signs_of_nan(values, format)
            assert got.inverse_scales.tolist() == inverses


def without_signs_of_nan(rows: list[list[int]], format: str) -> list[list[int]]:
    return [[0x7F if math.isnan(fp8.value_of(code, format)) else code for code in row] for row in rows]


def test_tall_tiles_have_ragged_edges_in_both_directions():
    x_MK = torch.randn(140, 150)
    got = quantise(x_MK, Operand("e4m3", (128, 128), FLOAT32))
    values, inverses = fp8.quantise(x_MK.tolist(), "e4m3", (128, 128), power_of_two=False)
    assert got.inverse_scales.shape == (2, 2)
    assert codes(got) == values and got.inverse_scales.tolist() == inverses


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_nothing_is_quantised_to_nothing(shape, tile):
    got = quantise(torch.zeros(shape), Operand("e4m3", tile, POWER_OF_TWO))
    assert got.values_MK.shape == shape and dequantise(got).shape == shape


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_dequantising_multiplies_each_value_by_the_inverse_scale_of_its_tile(tile):
    got = quantise(torch.randn(131, 150), Operand("e4m3", tile, FLOAT32))
    height, width = tile or (131, 150)
    values, inverses = got.values_MK.float().tolist(), got.inverse_scales.tolist()
    by_hand = [[v * inverses[i // height][j // width] for j, v in enumerate(row)] for i, row in enumerate(values)]
    assert torch.equal(dequantise(got), torch.tensor(by_hand, dtype=torch.float64).float())


def test_an_error_is_at_most_half_a_step_of_the_largest_value_of_its_tile():
    """E4M3 has steps of 32 below 448; a scale that is rounded down to a power of two may waste up to a binade."""
    x_MK = torch.randn(64, 300)
    for scales, bound in ((FLOAT32, 16 / 448), (POWER_OF_TWO, 16 / 224)):
        error = (round_to_grid(x_MK, Operand("e4m3", (1, 128), scales)) - x_MK).abs()
        for columns in (slice(0, 128), slice(128, 256), slice(256, 300)):
            assert (error[:, columns].amax(1) <= bound * x_MK[:, columns].abs().amax(1)).all()


@pytest.mark.parametrize("scales", [POWER_OF_TWO, FLOAT32])
def test_transposing_a_square_tile_is_quantising_the_transposed(scales):
    x_MK = torch.randn(140, 150)
    how = Operand("e4m3", (128, 128), scales)
    turned, again = quantise(x_MK, how).mT, quantise(x_MK.mT, how)
    assert codes(turned) == codes(again) and torch.equal(turned.inverse_scales, again.inverse_scales)
    assert turned.tile == again.tile
    one_row = quantise(x_MK, Operand("e4m3", (1, 128), scales)).mT
    assert one_row.tile == (128, 1) and torch.equal(dequantise(one_row), dequantise(one_row.mT).mT)


def test_with_powers_of_two_a_second_rounding_loses_nothing():
    """Why tokens may travel in FP8; with float32 scales it would not hold."""
    x = torch.randn(2, 7, 300, dtype=torch.bfloat16) * torch.exp2(torch.arange(-6.0, 8, 2)).view(1, 7, 1).bfloat16()
    how = Operand("e4m3", (1, 128), POWER_OF_TWO)
    once = round_to_grid(x, how)
    assert once.shape == x.shape and once.dtype == x.dtype and not torch.equal(once, x)
    assert torch.equal(round_to_grid(once, how), once)
    first, second = (quantise(each.reshape(-1, 300), how) for each in (x, once))
    assert codes(first) == codes(second) and torch.equal(first.inverse_scales, second.inverse_scales)


# ---- products -------------------------------------------------------------------------------------


def test_a_product_by_hand():
    """a = [3, 1] and b = [7, -2]: kept as [384, 128] / 128 and [448, -128] / 64, exactly; 3 * 7 - 1 * 2 = 19."""
    how = Operand("e4m3", (1, 128), POWER_OF_TWO)
    a, b = quantise(torch.tensor([[3.0, 1.0]]), how), quantise(torch.tensor([[7.0, -2.0], [0.0, 1.0]]), how)
    assert multiply(a, b).tolist() == multiply_tile_by_tile(a, b).tolist() == [[19.0, 1.0]]


@pytest.mark.parametrize("k", [128, 256, 300, 1024])
@pytest.mark.parametrize("scales", [POWER_OF_TWO, FLOAT32])
@pytest.mark.parametrize(
    "tiles", [((1, 128), (128, 128)), ((1, 128), (1, 128)), ((1, 32), (1, 32)), (None, None)], ids=str
)
def test_scaling_first_differs_from_scaling_sums_of_tiles_by_float32_alone(tiles, scales, k):
    a, b = (
        quantise(torch.randn(rows, k), Operand("e4m3", tile, scales))
        for rows, tile in zip((40, 140), tiles, strict=True)
    )
    exact = dequantise(a).double() @ dequantise(b).double().mT
    for product in (multiply(a, b), multiply_tile_by_tile(a, b)):
        assert relative_error(product, exact) < 5e-7
    assert torch.equal(multiply(a, b, torch.float64), exact)
    assert torch.equal(multiply(a, b, torch.bfloat16), multiply(a, b).bfloat16())


ERRORS = {  # relative Frobenius errors of forward, input gradient and weight gradient against float32
    "block": (Block(), (0.0374, 0.0375, 0.0376)),
    "block with float32 scales": (Block("float32"), (0.0367, 0.0368, 0.0364)),
    "current": (Current(), (0.0372, 0.0588, 0.0588)),
    "current with E4M3 gradients": (Current("e4m3"), (0.0372, 0.0372, 0.0372)),
    "mxfp8": (MXFP8(), (0.0375, 0.0375, 0.0375)),
}


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    x_MK, w_NK, g_MN = (torch.randn(shape, generator=generator) for shape in ((1024, 1024), (512, 1024), (1024, 512)))
    return x_MK, w_NK * 0.02, g_MN * 1e-3


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_products_are_the_measured_ones_within_5_percent(case, operands):
    """Of Gaussian matrices, M = K = 1024 and N = 512."""
    recipe, expected = ERRORS[case]
    x_MK, w_NK, g_MN = operands
    got = (
        relative_error(forward(x_MK, w_NK, recipe), x_MK @ w_NK.mT),
        relative_error(grad_input(g_MN, w_NK, recipe), g_MN @ w_NK),
        relative_error(grad_weight(g_MN, x_MK, recipe), g_MN.mT @ x_MK),
    )
    assert got == pytest.approx(expected, rel=0.05)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("recipe", [Block(), Current(), MXFP8()], ids=str)
def test_each_product_quantises_its_operands_along_what_it_sums_over(recipe):
    """A tile that is off by a power of two shows which way tiles lie: rounding in it is coarser."""
    x_MK, w_NK, g_MN = torch.randn(34, 132), torch.randn(130, 132), torch.randn(34, 130)
    activation, weight, gradient = recipe.activation, recipe.weight, recipe.gradient
    for got, a, how_a, b, how_b in (
        (forward(x_MK, w_NK, recipe), x_MK, activation, w_NK, weight),
        (grad_input(g_MN, w_NK, recipe), g_MN, gradient, w_NK.mT, weight),
        (grad_weight(g_MN, x_MK, recipe), g_MN.mT, gradient, x_MK.mT, activation),
    ):
        plain = [
            torch.tensor(
                [
                    [
                        fp8.value_of(code, how.format) * inverse_of(inverses, how.tile, i, j)
                        for j, code in enumerate(row)
                    ]
                    for i, row in enumerate(rows)
                ],
                dtype=torch.float64,
            )
            for how, (rows, inverses) in (
                (how, fp8.quantise(each.tolist(), how.format, how.tile, power_of_two=how.scales == POWER_OF_TWO))
                for each, how in ((a, how_a), (b, how_b))
            )
        ]
        assert relative_error(got, plain[0] @ plain[1].mT) < 5e-7


def inverse_of(inverses: list[list[float]], tile: tuple[int, int] | None, i: int, j: int) -> float:
    return inverses[0][0] if tile is None else inverses[i // tile[0]][j // tile[1]]


def test_sums_are_in_float64_where_the_operands_are():
    x, w = torch.randn(9, 200, dtype=torch.float64), torch.randn(7, 200, dtype=torch.float64)
    y = forward(x, w, Block())
    assert y.dtype == torch.float64
    exact = dequantise(quantise(x, Block().activation)).double() @ dequantise(quantise(w, Block().weight)).double().mT
    assert torch.equal(y, exact)
