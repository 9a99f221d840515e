import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.bf16_adamw import BF16AdamW

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def steps(optimizer, weight, *, count, first=0):
    for step in range(first, first + count):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
        optimizer.step()


def rounded(number):
    """The nearest bfloat16, found without torch's casts: eight significant bits, ties to even."""
    if number == 0:
        return 0.0
    exponent = torch.tensor(number, dtype=torch.float64).abs().log2().floor().item()
    unit = 2.0 ** (exponent - 7)
    return round(number / unit) * unit


def test_a_step_by_hand_in_plain_numbers():
    weight = nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
    optimizer = BF16AdamW([weight], **SETTINGS)
    w, m, v = weight.tolist(), [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 4):
        steps(optimizer, weight, count=1, first=step)
        for i, g in enumerate(weight.grad.tolist()):
            mean, square = m[i] + 0.1 * (g - m[i]), 0.95 * v[i] + 0.05 * g * g
            m[i], v[i] = rounded(mean), rounded(square)
            corrected = (square / (1 - 0.95**step)) ** 0.5
            w[i] = w[i] * (1 - 0.1 * 0.1) - 0.1 * mean / (1 - 0.9**step) / (corrected + 1e-8)
        state = optimizer.state[weight]
        assert weight.tolist() == pytest.approx(w, rel=1e-12)
        assert state["exp_avg"].tolist() == m and state["exp_avg_sq"].tolist() == v
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_it_goes_where_torchs_goes():
    ours, theirs = (nn.Parameter(torch.randn(300, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    start = ours.detach().clone()
    steps(BF16AdamW([ours], **SETTINGS), ours, count=50)
    steps(AdamW([theirs], **SETTINGS), theirs, count=50)
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()
    assert not torch.equal(ours, theirs)


def test_the_first_step_is_torchs_to_the_rounding_of_float32():
    """Moments are rounded when they are put away, not before they are used."""
    ours, theirs = (nn.Parameter(torch.ones(300)) for _ in range(2))
    steps(BF16AdamW([ours], **SETTINGS), ours, count=1)
    steps(AdamW([theirs], **SETTINGS), theirs, count=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_checkpoint_goes_on_bit_for_bit(dtype):
    """torch gives loaded states the parameter's type; what bfloat16 holds comes through that."""
    whole, part = (nn.Parameter(torch.ones(40, dtype=dtype)) for _ in range(2))
    steps(BF16AdamW([whole], **SETTINGS), whole, count=6)
    first = BF16AdamW([part], **SETTINGS)
    steps(first, part, count=3)
    second = BF16AdamW([part], lr=7.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, part, count=3, first=3)
    assert torch.equal(part, whole)
    assert second.state[part]["exp_avg"].dtype == torch.bfloat16


def test_loading_leaves_what_was_loaded_alone():
    weight = nn.Parameter(torch.ones(4))
    first = BF16AdamW([weight], **SETTINGS)
    steps(first, weight, count=1)
    state = first.state_dict()["state"][0]["exp_avg_sq"].clone()
    second = BF16AdamW([weight], **SETTINGS)
    second.load_state_dict(first.state_dict())
    steps(second, weight, count=1)
    assert torch.equal(first.state_dict()["state"][0]["exp_avg_sq"], state)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.95)])
def test_betas_by_which_a_moment_would_stand_still_are_refused(betas):
    with pytest.raises(
        ConfigurationError, match=r"betas=\(.*\) and moments in bfloat16 do not go together: above 0.98"
    ):
        BF16AdamW([nn.Parameter(torch.ones(1))], betas=betas)


def test_a_word_that_is_no_type_is_refused():
    with pytest.raises(ConfigurationError, match="moments='bf16' is neither 'float32' nor 'bfloat16'"):
        DeepSeekV3("tiny", moments="bf16")  # type: ignore[arg-type]
