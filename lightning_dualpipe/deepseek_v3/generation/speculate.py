"""Drafts of the next tokens by multi-token prediction (technical report, section 5.4.3).

    main model   h_n-1 ─► token n is chosen
    draft 1      depth 1 at position n-1, from h_n-1 and token n          ─► token n+1
    draft 2      depth 1 at position n, from its own output and draft 1   ─► token n+2      and so on

Depth 1 attends over its own positions: that of i holds h_i and token i+1. For positions behind the last that the
main model has seen, its own output stands in for h, which it was trained to resemble only indirectly; so further
drafts are accepted less often. What it remembers of them is written over when the main model has spoken.

Shapes: B sequences, S positions, K drafts, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.generation.cache import Places
from lightning_dualpipe.deepseek_v3.generation.forward import mtp_hidden_state, new_cache, remember_mtp
from lightning_dualpipe.deepseek_v3.generation.sampling import Sampler
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.mtp import MTP

__all__ = ["Drafter"]


@dataclass(frozen=True, slots=True)
class _Spoken:
    """What the main model has said since the last drafts: drafting goes on after the ``last_B``-th position."""

    h_BSD: Tensor
    next_tokens_BS: Tensor
    places: Places
    last_B: Tensor


class Drafter:
    def __init__(self, model: Transformer, sampler: Sampler, num_sequences: int, *, max_slots: int) -> None:
        self._model = model
        self._sampler = sampler
        self._mtp = cast(MTP, model.mtp[0])
        self._cache = new_cache(model, 1, num_sequences, max_slots=max_slots)
        self._spoken: _Spoken | None = None

    def read(self, h_BSD: Tensor, next_tokens_BS: Tensor, places: Places) -> None:
        """Positions of the prompts, with the tokens that follow them."""
        remember_mtp(self._model, self._mtp, h_BSD, next_tokens_BS, places, self._cache)

    def follow(self, h_BSD: Tensor, next_tokens_BS: Tensor, places: Places, last_B: Tensor) -> None:
        """The newest positions. Those behind ``last_B`` are of rejected drafts, and are written over in time."""
        self._spoken = _Spoken(h_BSD, next_tokens_BS, places, last_B)

    def draft(self, num_drafts: int) -> tuple[Tensor, Tensor]:
        """``tokens_BK`` that may follow the last one followed, and the probabilities they were drawn by [B, K, V]."""
        spoken = self._spoken
        assert spoken is not None, "follow comes before draft"
        joined_BSD, entries = remember_mtp(
            self._model, self._mtp, spoken.h_BSD, spoken.next_tokens_BS, spoken.places, self._cache
        )
        places = spoken.places.at(spoken.last_B)
        index_B11 = spoken.last_B[:, None, None].expand(-1, 1, joined_BSD.shape[-1])
        joined_B1D = joined_BSD.gather(1, index_B11)
        tokens, probabilities = [], []
        while True:
            h_B1D = mtp_hidden_state(self._mtp, joined_B1D, places, entries)
            q_B1V = self._sampler.probabilities(self._model.lm_head(h_B1D))
            token_B1 = self._sampler.choose(q_B1V)
            tokens.append(token_B1)
            probabilities.append(q_B1V)
            if len(tokens) == num_drafts:
                return torch.cat(tokens, dim=1), torch.cat(probabilities, dim=1)
            places = Places(places.positions_BS + 1, places.limit + 1)
            joined_B1D, entries = remember_mtp(self._model, self._mtp, h_B1D, token_B1, places, self._cache)

    def keep(self, rows: Tensor) -> None:
        """Only these sequences."""
        self._cache.keep(rows)
        if (spoken := self._spoken) is not None:
            places = Places(spoken.places.positions_BS[rows], spoken.places.limit)
            self._spoken = _Spoken(spoken.h_BSD[rows], spoken.next_tokens_BS[rows], places, spoken.last_B[rows])
