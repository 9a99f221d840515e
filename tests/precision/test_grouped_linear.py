import pytest
import torch
import torch.nn.functional as F

from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.grouped_linear import grouped_linear

COUNTS = [[3, 4], [0, 7, 0], [5, 0, 0, 2], [0, 0], [1], [0]]


def oracle(x_RI, weight_EOI, counts):
    """Row by row."""
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [weight_EOI[expert] @ x_I for expert, x_I in zip(experts, x_RI, strict=True)]
    return torch.stack(rows) if rows else x_RI.new_zeros(0, weight_EOI.shape[1]) + 0 * weight_EOI.sum() + 0 * x_RI.sum()


def run(function, counts, dtype, *, sizes=(6, 5), form=list, amp=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), sizes[1], generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), *sizes, generator=generator).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = function(x, weight, form(counts))
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    return y, x.grad, weight.grad


def deferred(x, weight, counts):
    queue = WeightGradients()
    queue.deferring = True
    y = grouped_linear(x, weight, counts, queue)

    def compute(_):
        torch.autograd.Variable._execution_engine.queue_callback(lambda: queue.run(len(queue)))

    y.register_hook(compute)
    return y


@pytest.mark.parametrize("form", [list, torch.tensor], ids=["list", "tensor"])
@pytest.mark.parametrize("function", [grouped_linear, deferred])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_values_and_gradients_are_those_of_single_rows(function, form, counts):
    """1e-12: a product of many rows may add in another order than that of one."""
    for got, want in zip(
        run(function, counts, torch.float64, form=form), run(oracle, counts, torch.float64), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("sizes", [(6, 5), (24, 16)], ids=["loop", "one call"])
@pytest.mark.parametrize(
    ("dtype", "amp"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_each_expert_gets_the_bits_of_a_linear_layer(counts, sizes, dtype, amp):
    def linears(x, weight, counts):
        parts = x.split(counts)
        return torch.cat([F.linear(part, each) for part, each in zip(parts, weight, strict=True)])

    for function in (grouped_linear, deferred):
        for got, want in zip(
            run(function, counts, dtype, sizes=sizes, amp=amp),
            run(linears, counts, dtype, sizes=sizes, amp=amp),
            strict=True,
        ):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("sizes", [(6, 5), (24, 16)], ids=["loop", "one call"])
def test_experts_without_rows_get_zeros(sizes):
    _, _, grad = run(grouped_linear, [0, 7, 0], torch.float32, sizes=sizes)
    assert not grad[0].any() and grad[1].any() and not grad[2].any()


def test_rows_gradients_and_weights_may_lie_anywhere_in_memory():
    counts, dense = [3, 0, 5], torch.randn(9, 16)
    weight = torch.randn(3 * 8 * 16 + 1)[1:].view(3, 8, 16)
    for x in (dense[1:], dense.flatten()[1:129].view(8, 16), torch.randn(16, 8).T, torch.randn(1, 16).expand(8, 16)):
        x, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = grouped_linear(x, w, counts)
        y.sum().backward()  # an expanded gradient
        want = torch.cat([part @ each.T for part, each in zip(x.split(counts), w, strict=True)])
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(w.grad[2], x[3:].sum(0).expand(8, 16))


def test_rows_without_gradient_and_frozen_experts():
    queue = WeightGradients()
    queue.deferring = True
    weight = torch.ones(2, 3, 4, requires_grad=True)
    grouped_linear(torch.ones(5, 4), weight, [5, 0], queue).sum().backward()
    queue.run(1)
    assert torch.equal(weight.grad, torch.tensor([5.0, 0.0])[:, None, None].expand(2, 3, 4))

    x = torch.ones(5, 4, requires_grad=True)
    grouped_linear(x, weight.detach(), [5, 0], queue).sum().backward()
    assert torch.equal(x.grad, torch.full((5, 4), 3.0)) and len(queue) == 0


@pytest.mark.parametrize("counts", [[2, 2], [6], [3, 2, 1]], ids=str)
def test_counts_that_do_not_fit_are_an_error(counts):
    with pytest.raises(AssertionError, match="counts"):
        grouped_linear(torch.ones(5, 4), torch.ones(2, 3, 4), counts)
