"""Models for tests of generation: random ones, and one that has learned enough for its drafts to be taken."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.model import Transformer
from tests.deepseek_v3.small import SMALL, randomize

CASES: dict[str, dict[str, Any]] = {
    "small": {},
    "queries_not_compressed": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "biases_but_not_of_plain_queries": {"attention_bias": True, "q_lora_rank": None},
    "no_yarn": {"rope_scaling": None},
    "halves_not_neighbours": {"rope_interleave": False},
    "tied": {"tie_word_embeddings": True},
    "no_mtp": {"num_nextn_predict_layers": 0},
    "three_depths": {"num_nextn_predict_layers": 3},
    "only_dense_layers": {"first_k_dense_replace": 3},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "no_shared_experts": {"n_shared_experts": 0},
    "one_group": {"n_group": 1, "topk_group": 1},
    "wide_values": {"v_head_dim": 17},
    "one_head": {"num_attention_heads": 1},
}


def random_module(**overrides: Any) -> DeepSeekV3:
    """Float64, weights of a size that matters."""
    config = DeepSeekV3Config(**{**SMALL, "max_position_embeddings": 256, **overrides})
    module = DeepSeekV3(config=config)
    module.configure_model()
    randomize(module.model)
    return module


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def greedy_by_full_forwards(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The definition: all positions again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def logits_of(model: Transformer, tokens_BT: Tensor) -> Tensor:
    logits = model({"input_ids": tokens_BT})
    assert isinstance(logits, Tensor)
    return logits


VOCABULARY = 16


@cache
def trained_module() -> DeepSeekV3:
    """Float64; trained on ``language``, so that drafts of the first and of later places are taken at times."""
    config = DeepSeekV3Config(
        **{**SMALL, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 256},
        initializer_range=0.1,
    ).with_overrides(num_nextn_predict_layers=1)
    module = DeepSeekV3(config=config, seed=0)
    module.configure_model()
    model = module.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        tokens = language(12, 33, seed=step)
        means = model({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
        assert isinstance(means, dict)
        optimizer.zero_grad()
        means["loss"].backward()
        optimizer.step()
    model.double()
    return module


def language(num_sequences: int, length: int, seed: int) -> Tensor:
    """Tokens [B, T]: mostly a function of the two before, at times anything."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (num_sequences, length), generator=generator)
    rare = torch.rand(num_sequences, length, generator=generator) < 0.15
    for place in range(2, length):
        rule = (tokens[:, place - 1] + 3 + tokens[:, place - 2] % 4) % VOCABULARY
        tokens[:, place] = torch.where(rare[:, place], tokens[:, place], rule)
    return tokens
