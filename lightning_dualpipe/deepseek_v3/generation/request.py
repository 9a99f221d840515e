"""What is asked of ``generate``, checked as a whole before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.block import Block
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.moe import MoE
from lightning_dualpipe.deepseek_v3.mtp import MTP
from lightning_dualpipe.deepseek_v3.norm import RMSNorm
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["Prompts", "Request", "Stop", "check_whole", "stop_sequences", "token_lists"]

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]
"""Token ids of one prompt or of several, which may differ in length; a tensor [T] or [B, T] has no padding."""
Stop = int | Sequence[int | Sequence[int]]
"""A token, or several tokens and sequences of tokens, any of which ends a text."""


@dataclass(frozen=True, slots=True)
class Request:
    """Arguments of ``generate``, whose documentation they have; ``stop`` is a list of sequences of tokens."""

    prompts: list[list[int]]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    speculate: int = 0
    prefill_chunk: int = 1024
    seed: int | torch.Generator | None = None
    stop_when: Callable[[Sequence[int]], bool] | None = None

    def check(self, config: DeepSeekV3Config) -> None:
        """
        Raises:
            ConfigurationError: anything about it that cannot be done with a model of this configuration.
        """
        problems = [*self._prompt_problems(config), *self._sampling_problems(), *self._decoding_problems(config)]
        if problems:
            raise ConfigurationError.of("this cannot be generated", problems)

    def new_generator(self, device: torch.device) -> torch.Generator:
        """Never torch's global one, which a training draws from."""
        if isinstance(self.seed, torch.Generator):
            return self.seed
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a text ends with the last of these new tokens."""
        stopped = any(tuple(tokens[-len(stop) :]) == stop for stop in self.stop)
        return stopped or (self.stop_when is not None and self.stop_when(tokens))

    def _prompt_problems(self, config: DeepSeekV3Config) -> Iterator[str]:
        if not self.prompts:
            yield "there are no prompts; give the token ids of one or more"
        for index, prompt in enumerate(self.prompts):
            where = f"prompt {index}" if len(self.prompts) > 1 else "the prompt"
            if not prompt:
                yield f"{where} is empty; a model continues at least one token, for instance the one that begins a text"
            elif strange := [token for token in prompt if not 0 <= token < config.vocab_size]:
                yield (
                    f"{where} has the token id {strange[0]}, the ids of this model are 0 to {config.vocab_size - 1} "
                    "(vocab_size): take the tokenizer that it was trained with"
                )
            elif len(prompt) + self.max_new_tokens > config.max_position_embeddings:
                yield (
                    f"{where} has {len(prompt)} tokens, with max_new_tokens={self.max_new_tokens} that exceeds "
                    f"max_position_embeddings={config.max_position_embeddings}: ask for less, or for a model trained "
                    f"for it overrides={{'max_position_embeddings': {len(prompt) + self.max_new_tokens}}}"
                )

    def _sampling_problems(self) -> Iterator[str]:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            yield f"temperature={self.temperature} must be 0, which takes the most likely token, or more"
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p} must be above 0 and at most 1, which keeps all tokens"
        if self.top_k is not None and self.top_k < 1:
            yield f"top_k={self.top_k} must be at least 1; None keeps all tokens"
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            yield (
                f"top_p={self.top_p} and top_k={self.top_k} have no effect at temperature=0, which takes the most "
                "likely token: set temperature=1 to sample, or leave them out"
            )

    def _decoding_problems(self, config: DeepSeekV3Config) -> Iterator[str]:
        for name, least in (("max_new_tokens", 1), ("speculate", 0), ("prefill_chunk", 1)):
            if (value := getattr(self, name)) < least:
                yield f"{name}={value} must be at least {least}"
        if self.speculate > 0 and config.num_nextn_predict_layers == 0:
            yield (
                f"speculate={self.speculate} needs multi-token prediction to draft with, and this model has none "
                "(num_nextn_predict_layers=0; transformers drops it when it saves): set speculate=0"
            )
        for stop in self.stop:
            if not stop or any(not 0 <= token < config.vocab_size for token in stop):
                yield (
                    f"stop={list(stop)} can never be generated: it takes one or more token ids from 0 to "
                    f"{config.vocab_size - 1} (vocab_size)"
                )


def token_lists(given: Any) -> list[list[int]]:
    """One prompt or several as lists of ids.

    Raises:
        ConfigurationError: they are something else.
    """
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.dim() not in (1, 2):
            raise _no_tokens(f"a tensor {list(given.shape)} of {given.dtype}")
        given = given.tolist()
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise _no_tokens(f"{type(given).__name__} {given!r:.40}")
    if given and all(_is_id(token) for token in given):
        return [[int(token) for token in given]]
    rows = [row.tolist() if isinstance(row, Tensor) and row.dim() == 1 else row for row in given]
    for row in rows:
        if isinstance(row, str | bytes) or not isinstance(row, Sequence) or not all(_is_id(token) for token in row):
            raise _no_tokens(f"{type(row).__name__} {row!r:.40} among the prompts")
    return [[int(token) for token in row] for row in rows]


def stop_sequences(given: Stop) -> tuple[tuple[int, ...], ...]:
    """
    Raises:
        ConfigurationError: something is neither a token id nor a sequence of them.
    """
    listed: Any = [given] if _is_id(given) else given
    if isinstance(listed, str | bytes) or not isinstance(listed, Sequence):
        raise _no_stop(given)
    found = []
    for stop in listed:
        tokens = (stop,) if _is_id(stop) else stop
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence) or not all(map(_is_id, tokens)):
            raise _no_stop(stop)
        found.append(tuple(int(token) for token in tokens))
    return tuple(found)


def check_whole(model: Transformer) -> None:
    """
    Raises:
        ConfigurationError: a part of the model is on another rank, or has no memory.
    """
    parts: list[tuple[str, nn.Module, type[nn.Module]]] = [
        ("embed_tokens", model.embed_tokens, nn.Embedding),
        *((f"blocks.{index}", block, Block) for index, block in enumerate(model.blocks)),
        ("norm", model.norm, RMSNorm),
        *((f"mtp.{index}", mtp, MTP) for index, mtp in enumerate(model.mtp)),
        ("lm_head", model.lm_head, nn.Linear),
    ]
    absent = [name for name, part, kind in parts if not isinstance(part, kind)]
    absent += [
        f"{name}.experts"
        for name, mixture in model.named_modules()
        if isinstance(mixture, MoE) and mixture.num_local_experts < mixture.num_experts
    ]
    if absent:
        raise ConfigurationError(
            f"this rank holds a part of the model only ({', '.join(absent[:4])}{', …' * (len(absent) > 4)} "
            "elsewhere), and generation needs all of it: save_pretrained(directory) on all ranks, then "
            "DeepSeekV3.from_pretrained(directory).generate(…) outside of this run, or run with one rank"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            "the model's parameters are on the meta device, which has no numbers: call generate outside of "
            "torch.device('meta'), after the weights were loaded"
        )


def _is_id(token: Any) -> bool:
    """A Python or numpy integer, or a tensor of one."""
    if isinstance(token, bool) or (isinstance(token, Tensor) and token.dim() > 0):
        return False
    return hasattr(token, "__index__") and not (isinstance(token, Tensor) and token.is_floating_point())


def _no_tokens(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} is no prompt: give token ids, as a list of integers or a tensor [T] for one prompt, and a list of "
        "those or a tensor [B, T] for several; lightning_dualpipe.data.tokenizers.load_tokenizer() makes them of text"
    )


def _no_stop(what: object) -> ConfigurationError:
    return ConfigurationError(
        f"stop={what!r} is neither a token id nor a sequence of token ids; text is for the command line's --stop, or "
        "encode it with the model's tokenizer"
    )
