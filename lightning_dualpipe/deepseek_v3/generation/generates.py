"""``generate`` and ``stream``, as methods of the LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.generation.decode import Generation, decode
from lightning_dualpipe.deepseek_v3.generation.request import (
    Prompts,
    Request,
    Stop,
    check_whole,
    stop_sequences,
    token_lists,
)
from lightning_dualpipe.deepseek_v3.model import Transformer

__all__ = ["Generates", "TokenStream"]


class TokenStream(Iterator[list[list[int]]]):
    """New tokens of each prompt, in the order of the prompts, as they are chosen; none for a text that has ended.

    ``generation`` has all so far, and is complete when the stream is.
    """

    def __init__(self, model: Transformer, request: Request) -> None:
        self.generation = Generation.of(request)
        self._steps = decode(model, request, self.generation)

    def __next__(self) -> list[list[int]]:
        return next(self._steps)


class Generates:
    """For a module with a ``config``, a ``model``, and a ``configure_model`` that gives it weights."""

    config: DeepSeekV3Config
    model: Transformer
    hparams: Any
    configure_model: Callable[[], None]

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Stop | None = None,
        speculate: int = 0,
        prefill_chunk: int = 1024,
        seed: int | torch.Generator | None = None,
        stop_when: Callable[[Sequence[int]], bool] | None = None,
    ) -> Generation:
        """Continue one prompt or several, on the device and in the precision of the parameters.

        Args:
            prompts: token ids of one prompt, or of several of any lengths; a tensor [T] or [B, T] has no padding.
            max_new_tokens: of each text.
            temperature: 0 takes the most likely token, 1 draws from the model's distribution, more is more even.
            top_p: draw only from the most likely tokens, as many as together have this probability.
            top_k: draw only from so many of the most likely tokens.
            stop: a token id, or several token ids and sequences of these, any of which ends a text. Default: the
                model's ``eos_token_id``; ``[]`` for none.
            speculate: tokens drafted by multi-token prediction in each round. It changes the time that is taken,
                not what is chosen: at temperature 0 the same tokens, else the same distribution.
            prefill_chunk: tokens of a prompt read at a time, which bounds the memory for long ones.
            seed: of what is drawn, or a generator on the model's device; by default another one each time. The
                global generators, which a training draws from, are left alone.
            stop_when: called with the new tokens of a text after each; true ends it.

        Raises:
            ConfigurationError: this cannot be generated, with every reason; or a pipeline has cut the model.
            FloatingPointError: the model's logits are not finite.
        """
        stream = self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            speculate=speculate,
            prefill_chunk=prefill_chunk,
            seed=seed,
            stop_when=stop_when,
        )
        for _ in stream:
            pass
        return stream.generation

    def stream(self, prompts: Prompts, *, stop: Stop | None = None, **options: Any) -> TokenStream:
        """As ``generate``, whose arguments it takes, while it goes on: an iterator over the new tokens.

        Raises:
            as ``generate``, at once but for logits that are not finite.
        """
        stops = stop_sequences(self._eos() if stop is None else stop)
        request = Request(token_lists(prompts), stop=stops, **options)
        request.check(self.config)
        self.configure_model()
        check_whole(self.model)
        return TokenStream(self.model, request)

    def _eos(self) -> Stop:
        eos = (self.hparams["token_ids"] or {}).get("eos_token_id")
        return [] if eos is None else eos
