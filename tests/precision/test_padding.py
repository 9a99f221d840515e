from itertools import accumulate

import pytest
import torch

from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.padding import pad_rows, padded_counts, unpad_rows
from lightning_dualpipe.precision.recipe import Block
from lightning_dualpipe.precision.reference import quantise

COUNTS = [[3, 0, 5], [16, 32], [0, 0], [1], [17, 16, 0, 130], [0, 128, 1], []]


def one_by_one(x, counts, multiple):
    """The definition: row after row into a tensor of zeros."""
    starts = list(accumulate((-(-count // multiple) * multiple for count in counts), initial=0))
    padded = x.new_zeros(starts[-1], x.shape[1])
    where = [start + index for start, count in zip(starts, counts, strict=False) for index in range(count)]
    for row, position in zip(x, where, strict=True):
        padded[position] = row
    return padded, where


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("multiple", [1, 16, 32])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_are_where_a_copy_of_each_puts_them_and_come_back(counts, multiple):
    x = draw(sum(counts), 5)
    padded, wide = pad_rows(x, counts, multiple)
    want, _ = one_by_one(x, counts, multiple)
    assert torch.equal(padded, want) and wide == padded_counts(counts, multiple)
    assert all(count % multiple == 0 for count in wide)
    assert all((count == 0) == (before == 0) for count, before in zip(wide, counts, strict=True))
    assert torch.equal(unpad_rows(padded, counts, multiple), x)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_is_the_backward_of_the_other(counts):
    """<pad x, y> = <x, unpad y>, and the gradients are these, bit for bit."""
    x = draw(sum(counts), 5, dtype=torch.float64).requires_grad_()
    y = draw(sum(padded_counts(counts, 16)), 5, seed=1, dtype=torch.float64).requires_grad_()
    (grad_x,) = torch.autograd.grad((pad_rows(x, counts, 16)[0] * y.detach()).sum(), x)
    (grad_y,) = torch.autograd.grad((unpad_rows(y, counts, 16) * x.detach()).sum(), y)
    assert torch.equal(grad_x, unpad_rows(y.detach(), counts, 16))
    assert torch.equal(grad_y, pad_rows(x.detach(), counts, 16)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize("counts", [[3, 0, 5], [17, 16, 0, 130], [0, 0, 7], [1, 250]], ids=str)
def test_padding_changes_no_bit_of_a_grouped_product_and_its_gradients(counts, multiple, dtype):
    """Products of FP8 values are added in float64 here, where that is exact: the order has no say.

    Added in float32, the number of rows may choose another order, and then it is not padding that is measured.
    """
    x, weight, grad = draw(sum(counts), 40), draw(len(counts), 24, 40, seed=1), draw(sum(counts), 24, seed=2)

    def run(padded):
        matmul = EmulateBackend(Block()).grouped_linear()
        exact = matmul.multiply
        matmul.multiply = lambda a, b, out: exact(a, b, torch.float64).to(out)
        own, weights = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if padded:
            rows, wide = pad_rows(own, counts, multiple)
            y = unpad_rows(matmul(rows, weights, wide, None), counts, multiple)
        else:
            y = matmul(own, weights, counts, None)
        y.backward(grad.to(dtype))
        return y.detach(), own.grad, weights.grad

    for got, want in zip(run(padded=True), run(padded=False), strict=True):
        assert want.any() and torch.equal(got, want)


@pytest.mark.parametrize("count", [1, 16, 100, 127, 128, 129, 250])
def test_padding_changes_neither_scales_nor_values_along_the_rows(count):
    """What the gradient of a weight is made of: tiles of 128 tokens."""
    how = Block().activation
    x = draw(count, 6)
    padded, _ = pad_rows(x, [count], 16)
    without, with_zeros = quantise(x.mT, how), quantise(padded.mT, how)
    assert torch.equal(without.inverse_scales, with_zeros.inverse_scales)
    assert torch.equal(without.values_MK.float(), with_zeros.values_MK[:, :count].float())
    assert not with_zeros.values_MK[:, count:].float().any()


def test_what_is_a_multiple_already_is_not_copied():
    x = draw(48, 3)
    padded, counts = pad_rows(x, [16, 32], 16)
    assert padded is x and counts == [16, 32] and unpad_rows(x, [16, 32], 16) is x


@pytest.mark.parametrize("counts", [[2, 2], [6], [-1, 6]], ids=str)
def test_counts_that_do_not_fit_are_an_error(counts):
    with pytest.raises(AssertionError, match=r"counts add up|to multiples"):
        pad_rows(draw(5, 3), counts, 16)
    with pytest.raises(AssertionError, match=r"were padded to|to multiples"):
        unpad_rows(draw(5, 3), counts, 16)
