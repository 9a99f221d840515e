"""What attention remembers of a token: one latent for the keys and values of all heads, and one rotary key.

    slot          0    1    2    3    4    5    6             slot t holds position t of a sequence
    sequence 0    a    b    c    d    .    .    .             what is written next comes after ``d``
    sequence 1    e    f    x    x    .    .    .             x: padding, or a draft that was rejected

A query at position t sees the slots up to t, so nothing behind the end of a sequence is ever seen. That
is all that padding and the rejection of drafts need: the next tokens are written over them.

Shapes: B sequences, K slots, S new positions, C latent, R rotary, W = C + R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LatentCache", "Places"]


@dataclass(frozen=True, slots=True)
class Places:
    """Where new tokens stand: ``positions_BS`` on the device of the model, ``limit`` slots reach beyond all of them.

    The B sequences are the first ones of a cache, which may hold more.
    """

    positions_BS: Tensor
    limit: int

    @classmethod
    def of(cls, starts_B: Tensor, width: int, limit: int) -> Places:
        """``width`` positions of each sequence, from ``starts_B`` on; ``limit`` is known without asking the device."""
        return cls(starts_B.unsqueeze(-1) + torch.arange(width, device=starts_B.device), limit)

    def at(self, index_B: Tensor) -> Places:
        """One position of each sequence, the ``index_B``-th."""
        return Places(self.positions_BS.gather(1, index_B.unsqueeze(-1)), self.limit)


class LatentCache:
    """``num_layers`` tensors [B, K, W]; K doubles when it has to, and never exceeds ``max_slots``."""

    def __init__(
        self,
        num_layers: int,
        num_sequences: int,
        width: int,
        *,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_slots = max_slots
        empty = torch.zeros(num_sequences, 0, width, dtype=dtype, device=device)
        self._layers = [empty] * num_layers

    def write(self, layer: int, entries_BSW: Tensor, places: Places) -> Tensor:
        """Keep the entries of new positions; returns those of all slots that these may see, a view [B, K, W]."""
        assert places.limit <= self.max_slots, f"slot {places.limit - 1} of {self.max_slots}"
        self._reserve(layer, places.limit)
        num_sequences = len(entries_BSW)
        rows_B1 = torch.arange(num_sequences, device=entries_BSW.device).unsqueeze(-1)
        kept = self._layers[layer]
        kept[rows_B1, places.positions_BS] = entries_BSW.to(kept.dtype)
        return kept[:num_sequences, : places.limit]

    def keep(self, rows: Tensor) -> None:
        """Only these sequences, in this order."""
        self._layers = [kept[rows] for kept in self._layers]

    @property
    def num_bytes(self) -> int:
        return sum(kept.nbytes for kept in self._layers)

    def _reserve(self, layer: int, num_slots: int) -> None:
        kept = self._layers[layer]
        held = kept.shape[1]
        if held < num_slots:
            size = min(max(num_slots, 2 * held), self.max_slots)
            # zeros, not whatever was in memory: a slot that is not seen has weight 0, and 0 times NaN is NaN
            grown = kept.new_zeros(kept.shape[0], size, kept.shape[2])
            grown[:, :held] = kept
            self._layers[layer] = grown
