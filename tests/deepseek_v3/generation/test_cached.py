"""Decoding with a cache gives the logits of a forward over everything, in float64 to 1e-10."""

import pytest
import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.generation import attention as cached
from lightning_dualpipe.deepseek_v3.generation.cache import LatentCache, Places
from lightning_dualpipe.deepseek_v3.generation.forward import hidden_states, mtp_hidden_state, new_cache, remember_mtp
from lightning_dualpipe.deepseek_v3.model import Transformer
from tests.deepseek_v3.generation.models import CASES, logits_of, random_module, random_prompts

LENGTH = 24  # beyond the 16 positions that YaRN's small model was made for


def steps(model: Transformer, tokens_BT: Tensor, widths: list[int]) -> tuple[Tensor, LatentCache]:
    """Hidden states [B, T, D] of tokens that come in pieces."""
    cache = new_cache(model, len(model.blocks), len(tokens_BT), max_slots=tokens_BT.shape[1])
    found, start = [], 0
    for width in widths:
        places = Places.of(torch.full((len(tokens_BT),), start), width, start + width)
        found.append(hidden_states(model, tokens_BT[:, start : start + width], places, cache))
        start += width
    assert start == tokens_BT.shape[1]
    return torch.cat(found, dim=1), cache


@pytest.fixture(params=["absorbed", "expanded"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cached, "is_absorbed_cheaper", lambda *_: request.param == "absorbed")
    return str(request.param)


@pytest.mark.parametrize("widths", [[LENGTH], [11, 1, 1, 1, 6, 1, 3]], ids=["whole", "pieces"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_a_forward_over_everything(case: str, widths: list[int], form: str) -> None:
    model = random_module(**CASES[case]).model
    tokens_BT = torch.tensor(random_prompts(model.config.vocab_size, [LENGTH] * 2))
    want = logits_of(model, tokens_BT)
    assert want.std() > 0.3, "logits that hardly vary would prove nothing"

    got = model.lm_head(steps(model, tokens_BT, widths)[0])

    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_both_forms_of_attention_are_taken_where_they_are_cheaper() -> None:
    attention = random_module(kv_lora_rank=512, qk_nope_head_dim=128, v_head_dim=128).model.blocks[0].self_attn
    assert cached.is_absorbed_cheaper(attention, 4, 4096)  # type: ignore[arg-type]
    assert not cached.is_absorbed_cheaper(attention, 1024, 4096)  # type: ignore[arg-type]
    assert not cached.is_absorbed_cheaper(attention, 1024, 1024)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_a_time", [1, 100, 1 << 22])
@torch.no_grad()
def test_blocks_of_scores_change_nothing(at_a_time: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_module().model
    tokens_BT = torch.tensor(random_prompts(model.config.vocab_size, [LENGTH] * 3))
    want = logits_of(model, tokens_BT)
    monkeypatch.setattr(cached, "_AT_A_TIME", at_a_time)
    got = model.lm_head(steps(model, tokens_BT, [15, 9])[0])
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@torch.no_grad()
def test_sequences_go_on_from_positions_of_their_own_and_over_what_was_rejected() -> None:
    """Row 0 goes on at 5, row 1 at 9, where both had read up to 12: what was there before must not show."""
    model = random_module().model
    tokens_BT = torch.tensor(random_prompts(model.config.vocab_size, [20] * 2))
    _, cache = steps(model, tokens_BT[:, :12], [12])
    others_BS = torch.tensor(random_prompts(model.config.vocab_size, [4, 4], seed=8))
    starts = [5, 9]
    cache.max_slots = 20

    places = Places.of(torch.tensor(starts), 4, 13)
    got = model.lm_head(hidden_states(model, others_BS, places, cache))

    for row, start in enumerate(starts):
        whole = torch.cat((tokens_BT[row, :start], others_BS[row]))
        torch.testing.assert_close(got[row], logits_of(model, whole[None])[0, start:], atol=1e-10, rtol=0)


@torch.no_grad()
def test_depth_1_sees_with_a_cache_what_it_sees_in_training() -> None:
    model = random_module(num_nextn_predict_layers=1).model
    tokens_BT = torch.tensor(random_prompts(model.config.vocab_size, [LENGTH] * 2))
    h_BTD, _ = steps(model, tokens_BT, [LENGTH])
    mtp = model.mtp[0]
    want, _ = mtp(h_BTD[:, :-1], model.embed_tokens(tokens_BT[:, 1:]), h_BTD.new_zeros(2))

    cache = new_cache(model, 1, 2, max_slots=LENGTH)
    found = []
    for start, stop in ((0, 15), (15, 16), (16, LENGTH - 1)):
        places = Places.of(torch.full((2,), start), stop - start, stop)
        following_BS = tokens_BT[:, start + 1 : stop + 1]
        joined, entries = remember_mtp(model, mtp, h_BTD[:, start:stop], following_BS, places, cache)  # type: ignore[arg-type]
        found.append(mtp_hidden_state(mtp, joined, places, entries))  # type: ignore[arg-type]

    torch.testing.assert_close(torch.cat(found, dim=1), want, atol=1e-10, rtol=0)


def test_a_cache_grows_to_what_is_asked_and_no_further() -> None:
    cache = LatentCache(3, 2, 6, max_slots=50, dtype=torch.float64, device=torch.device("cpu"))
    assert cache.num_bytes == 0
    sizes = []
    for start in range(50):
        places = Places.of(torch.full((2,), start), 1, start + 1)
        entries = torch.full((2, 1, 6), float(start), dtype=torch.float64)
        seen, *_ = (cache.write(layer, entries, places) for layer in range(3))
        assert seen[:, :, 0].tolist() == [list(map(float, range(start + 1)))] * 2
        sizes.append(cache.num_bytes // (3 * 2 * 6 * 8))
    assert sizes[-1] == 50 and sizes == sorted(sizes) and len(set(sizes)) <= 7

    cache.keep(torch.tensor([1]))
    assert cache.num_bytes == 50 * 3 * 6 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_precisions_stay_near(dtype: torch.dtype) -> None:
    """As near as a forward over everything in the same precision is, within a factor."""
    model = random_module(first_k_dense_replace=3).model  # a router near a tie turns rounding into another expert
    tokens_BT = torch.tensor(random_prompts(model.config.vocab_size, [LENGTH] * 2))
    exact = logits_of(model, tokens_BT)
    model.to(dtype)
    plain = (logits_of(model, tokens_BT).double() - exact).abs().max()
    hidden, cache = steps(model, tokens_BT, [17, *[1] * 7])
    ours = (model.lm_head(hidden).double() - exact).abs().max()
    assert hidden.dtype == dtype and 0 < ours < 3 * plain
    assert cache.num_bytes == 2 * LENGTH * 3 * (10 + 8) * dtype.itemsize
