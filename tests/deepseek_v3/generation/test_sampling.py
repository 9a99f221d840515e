"""Which tokens may be drawn, and that a verified draft is as good as a token drawn from the model."""

import pytest
import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.generation.sampling import Sampler
from tests.marks import needs


def sampler(temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None, seed: int = 0) -> Sampler:
    return Sampler(temperature, top_p, top_k, torch.Generator().manual_seed(seed))


def logits(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@needs("transformers")
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 100])
@pytest.mark.parametrize("top_p", [1e-9, 0.4, 0.95, 1.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    want = given = logits(20, 31)
    for warp in (TemperatureLogitsWarper(temperature), top_k and TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        want = warp(torch.zeros(20, 1), want) if warp else want
    got = sampler(temperature, top_p, top_k).probabilities(given)
    torch.testing.assert_close(got, want.softmax(-1), atol=1e-12, rtol=0)


def test_temperatures_near_zero_take_the_most_likely_token() -> None:
    given = logits(5, 3, 11)
    for temperature in (0.0, 1e-300, 1e-6):
        probabilities = sampler(temperature).probabilities(given)
        assert torch.equal(probabilities, torch.nn.functional.one_hot(given.argmax(-1), 11).double())
        assert torch.equal(sampler(temperature).choose(probabilities), given.argmax(-1))


def test_half_types_are_widened_and_numbers_that_are_none_refused() -> None:
    assert sampler().probabilities(logits(3, 7).bfloat16()).dtype == torch.float32
    for bad in (float("nan"), float("inf")):
        given = logits(3, 7)
        given[1, 2] = bad
        with pytest.raises(FloatingPointError):
            sampler().probabilities(given)
    impossible = logits(3, 7)
    impossible[:, 2] = float("-inf")
    assert (sampler().probabilities(impossible)[:, 2] == 0).all()


@pytest.mark.parametrize("likeness", ["alike", "different", "apart"])
def test_what_is_verified_is_distributed_as_the_model_has_it(likeness: str) -> None:
    """Three places, five tokens: the joint distribution of the tokens chosen, against products of p."""
    count, num_drafts, vocabulary = 100_000, 2, 5
    p_JV = logits(3, vocabulary).softmax(-1)
    q_KV = p_JV[:2].clone() if likeness == "alike" else logits(5, vocabulary)[3:].softmax(-1)
    if likeness == "apart":  # what the model prefers is never drafted
        q_KV[:, p_JV[:2].argmax(-1)] = 0
        q_KV /= q_KV.sum(-1, keepdim=True)
    drawn = sampler(seed=5)
    q_BKV, p_BJV = q_KV.expand(count, -1, -1), p_JV.expand(count, -1, -1)
    drafts_BK = drawn.choose(q_BKV)

    accepted_B, next_B = drawn.verify(drafts_BK, q_BKV, p_BJV)

    for place in range(num_drafts + 1):
        reached = accepted_B >= place
        chosen = torch.where(accepted_B == place, next_B, drafts_BK[:, min(place, num_drafts - 1)])[reached]
        observed = torch.bincount(chosen, minlength=vocabulary).double()
        expected = p_JV[place] * reached.sum()
        chi_square = float(((observed - expected) ** 2 / expected).sum())
        assert chi_square < vocabulary - 1 + 5 * (2 * (vocabulary - 1)) ** 0.5, (place, observed, expected)
    rate = float((accepted_B > 0).double().mean())
    assert rate == pytest.approx(float(torch.minimum(p_JV[0], q_KV[0]).sum()), abs=0.01)
    assert rate == 1 if likeness == "alike" else 0.01 < rate < 0.95


def test_greedy_drafts_are_accepted_up_to_the_first_that_the_model_would_not_choose() -> None:
    greedy, vocabulary = sampler(0.0), 6
    choices = torch.tensor([1, 2, 3, 4])
    p_BJV = torch.nn.functional.one_hot(choices, vocabulary).double().expand(4, -1, -1)
    drafts_BK = torch.tensor([[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3]])
    accepted_B, next_B = greedy.verify(drafts_BK, torch.nn.functional.one_hot(drafts_BK, vocabulary).double(), p_BJV)
    assert accepted_B.tolist() == [3, 2, 1, 0] and next_B.tolist() == [4, 3, 2, 1]
