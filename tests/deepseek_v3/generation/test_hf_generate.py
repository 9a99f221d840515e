"""Greedy texts are those of transformers' ``generate``, token for token, and 128K positions are where it has them.

Both compute in float64 (see ``tests/oracles/transformers_float64.py``).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.deepseek_v3.generation import forward
from lightning_dualpipe.deepseek_v3.generation.cache import Places
from lightning_dualpipe.deepseek_v3.generation.forward import hidden_states, new_cache
from tests.deepseek_v3.generation.models import random_prompts
from tests.deepseek_v3.test_hf_parity import BASE, CASES, YARN
from tests.marks import needs

pytestmark = needs("transformers")

LENGTHS = [1, 5, 12, 30]


@pytest.mark.parametrize(
    "case",
    [
        "as_released",
        "queries_not_compressed",
        "yarn_two_mscales",
        "no_yarn_other_theta_and_eps",
        "tied",
        "uneven_groups",
    ],
)
def test_greedy_texts_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    from tests.oracles.transformers_float64 import new_reference

    reference = new_reference(**BASE | CASES[case])
    reference.save_pretrained(tmp_path)
    module = DeepSeekV3.from_pretrained(tmp_path).double()
    prompts = random_prompts(module.config.vocab_size, LENGTHS)
    expected = []
    for prompt in prompts:
        expected.append(by_transformers(reference, prompt, eos_token_id=None))

    generated = module.generate(prompts, max_new_tokens=16, stop=[], prefill_chunk=8)

    assert len({tuple(text) for text in expected}) == len(LENGTHS)
    assert generated.tokens == expected


def test_the_end_of_a_text_is_that_of_transformers(tmp_path: Path) -> None:
    from tests.oracles.transformers_float64 import new_reference

    reference = new_reference(**BASE)
    prompt = random_prompts(67, [9])[0]
    eos = by_transformers(reference, prompt, eos_token_id=None)[6]
    reference.config.eos_token_id = reference.generation_config.eos_token_id = eos
    expected = by_transformers(reference, prompt)
    reference.save_pretrained(tmp_path)

    generated = DeepSeekV3.from_pretrained(tmp_path).double().generate(prompt, max_new_tokens=16)

    assert generated.tokens == [expected] and len(expected) <= 7
    assert generated.finish_reasons == ["stop"]


def by_transformers(reference: Any, prompt: list[int], **options: Any) -> list[int]:
    from tests.oracles.transformers_float64 import in_float64

    tokens = torch.tensor([prompt])
    everything = torch.ones_like(tokens)  # without a mask, transformers takes tokens with the id of padding for it
    with in_float64(), torch.no_grad():
        whole = reference.generate(
            tokens, attention_mask=everything, max_new_tokens=16, do_sample=False, pad_token_id=0, **options
        )
    return whole[0, len(prompt) :].tolist()


LONG: dict[str, Any] = {
    **BASE,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "hidden_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840,
    "rope_parameters": {**YARN, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
}


@torch.no_grad()
def test_chunks_beyond_the_trained_length_are_those_of_transformers(tmp_path: Path) -> None:
    """YaRN by 40 from 4096 positions, both with a cache and in chunks: logits at the end of each."""
    from transformers import DynamicCache

    from tests.oracles.transformers_float64 import in_float64, new_reference

    reference = new_reference(**LONG)
    reference.save_pretrained(tmp_path)
    reference.set_attn_implementation("sdpa")
    model = DeepSeekV3.from_pretrained(tmp_path).double().model
    length, chunk = 6000, 2000
    tokens_1T = torch.tensor(random_prompts(model.config.vocab_size, [length]))

    theirs, ours = DynamicCache(config=reference.config), new_cache(model, 2, 1, max_slots=length)
    for start in range(0, length, chunk):
        piece = tokens_1T[:, start : start + chunk]
        with in_float64():
            want = reference(piece, past_key_values=theirs, logits_to_keep=16).logits
        places = Places.of(torch.tensor([start]), chunk, start + chunk)
        got = model.lm_head(hidden_states(model, piece, places, ours)[:, -16:])
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    assert want.std() > 0.3


@torch.no_grad()
def test_positions_up_to_128k_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits at selected positions, each attending to all before it.

    What a single layer caches of a token depends on the token and its position alone. So both caches are filled
    with attention left out, which for all 131,072 positions would take minutes, and then asked from behind.
    """
    from transformers import AttentionInterface, DynamicCache

    from tests.oracles.transformers_float64 import in_float64, new_reference

    def nothing(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(query[..., : value.shape[-1]]).transpose(1, 2), None

    AttentionInterface.register("nothing", nothing)
    reference = new_reference(**{**LONG, "num_hidden_layers": 1, "first_k_dense_replace": 0})
    reference.save_pretrained(tmp_path)
    model = DeepSeekV3.from_pretrained(tmp_path).double().model
    length, chunk, asked = 131072, 8192, 4
    tokens_1T = torch.tensor(random_prompts(model.config.vocab_size, [length]))

    theirs, ours = DynamicCache(config=reference.config), new_cache(model, 1, 1, max_slots=length)
    reference.set_attn_implementation("nothing")
    for start in range(0, length, chunk):
        piece = tokens_1T[:, start : start + chunk]
        with in_float64():
            reference(piece, past_key_values=theirs, logits_to_keep=1)
        with monkeypatch.context() as patch:
            patch.setattr(forward, "attend", lambda attention, x_BSD, *_: torch.zeros_like(x_BSD))
            hidden_states(model, piece, Places.of(torch.tensor([start]), chunk, start + chunk), ours)
    assert ours.num_bytes == length * (8 + 8) * 8

    reference.set_attn_implementation("eager")
    for end in (131072, 131000, 100003, 65536, 40961, 16384, 4099, 4096, 512, 4):
        start = end - asked
        theirs.crop(start - theirs.get_seq_length())
        piece = tokens_1T[:, start:end]
        with in_float64():
            want = reference(piece, past_key_values=theirs).logits
        got = model.lm_head(hidden_states(model, piece, Places.of(torch.tensor([start]), asked, end), ours))
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0, msg=lambda text, at=start: f"from {at}: {text}")
        assert want.std() > 0.3
