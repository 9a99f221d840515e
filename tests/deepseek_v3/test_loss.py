"""Losses by hand, and cross entropy against torch's."""

import pytest
import torch
import torch.nn.functional as F

from lightning_dualpipe.deepseek_v3 import loss
from lightning_dualpipe.deepseek_v3.loss import cross_entropy_sum, loss_sums


@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_cross_entropy_and_its_gradient_are_those_of_torch(monkeypatch, chunk):
    monkeypatch.setattr(loss, "_CHUNK", chunk)
    logits = 5 * torch.randn(2, 7, 11, dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.randint(11, (2, 7))
    labels[0, :3] = -100

    got = cross_entropy_sum(logits, labels)
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    got_grad, want_grad = (torch.autograd.grad(3 * y, logits)[0] for y in (got, want))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-13)


def test_cross_entropy_of_bfloat16_is_taken_in_float32():
    logits = (10 * torch.randn(3, 50, 300)).bfloat16().requires_grad_()
    labels = torch.randint(300, (3, 50))
    got = cross_entropy_sum(logits, labels)
    (grad,) = torch.autograd.grad(got, logits)

    wide = logits.detach().float().requires_grad_()
    want = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")
    (want_grad,) = torch.autograd.grad(want, wide)
    assert got.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad.bfloat16())


@pytest.mark.parametrize("labels", [torch.empty(2, 0, dtype=torch.int64), torch.full((2, 4), -100)])
def test_nothing_to_learn_is_loss_0_with_a_gradient_of_zeros(labels):
    logits = torch.randn(*labels.shape, 5, requires_grad=True)
    total = cross_entropy_sum(logits, labels)
    total.backward()

    assert total.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def one_hot_logits(tokens):
    return 50.0 * F.one_hot(torch.tensor(tokens), 5)


def test_sums_by_hand():
    """Two sequences of 4; certain logits cost 0 where they are right and 50 where they are wrong."""
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, -100, 0]])
    logits = one_hot_logits([[1, 2, 3, 0], [1, 2, 3, 0]])  # 1 wrong of 7
    depth_1 = one_hot_logits([[2, 3, 0], [2, 3, 0]])  # aims at [[2, 3, 4], [2, -100, 0]]: 1 wrong
    depth_2 = one_hot_logits([[3, 4], [3, 1]])  # aims at [[3, 4], [-100, 0]]: 1 wrong
    sums = loss_sums(logits, [depth_1, depth_2], torch.tensor([0.5, 0.25]), labels, mtp_weight=0.3)

    assert sums["tokens"].item() == 7
    assert sums["next_token_loss"].item() == pytest.approx(50)
    assert sums["mtp_loss"].item() == pytest.approx((50 + 50) / 2)
    assert sums["balance_loss"].item() == 0.75
    assert sums["loss"].item() == pytest.approx(50 + 0.3 * 50 + 0.75)
    # greedy choices of the main model where the depths look: [[2, 3, 0], [2, x, 0]] and [[3, 0], [x, 0]]
    first, second = (3 / 3 + 1 / 2) / 2, (2 / 2 + 0 / 1) / 2
    assert sums["mtp_agreement"].item() == pytest.approx(4 * first + 3 * second)


def test_sums_are_sums_over_microbatches():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(5, (6, 8), generator=generator)
    labels[1, 2:] = -100
    logits, ahead = torch.randn(6, 8, 5, generator=generator), torch.randn(6, 7, 5, generator=generator)
    balance = torch.rand(6, generator=generator)

    def of(rows):
        return loss_sums(logits[rows], [ahead[rows]], balance[rows], labels[rows], mtp_weight=0.3)

    whole, parts = of(slice(0, 6)), [of(slice(0, 1)), of(slice(1, 4)), of(slice(4, 6))]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


def test_without_depths_nothing_is_said_about_them():
    sums = loss_sums(torch.randn(1, 2, 5), [], torch.zeros(1), torch.tensor([[1, 2]]), mtp_weight=0.3)
    assert set(sums) == {"loss", "tokens", "next_token_loss", "balance_loss"}
