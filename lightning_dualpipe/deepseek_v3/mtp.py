"""Multi-token prediction: depth k predicts the token k further ahead (technical report, section 2.2).

    h^(k-1)_i ─► hnorm ─┐
                        ├─ eh_proj ─► decoder block ─► norm ─► h^k_i ─► shared head: token i + k + 1
    token i+k ─► embed ─► enorm ┘

Depth 1 starts from the main model's hidden state after its final norm. For T tokens depth k has
T - k positions; embedding and head are the main model's. The released projection has the embedding's
columns first, although eq. 21 prints the hidden state first.

Shapes: B sequences, T positions, D hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.block import MoEBlock
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.norm import RMSNorm
from lightning_dualpipe.deepseek_v3.padding import ahead
from lightning_dualpipe.deepseek_v3.recompute import Recompute, compute_phase, rebuilt
from lightning_dualpipe.deepseek_v3.rope import Rotary
from lightning_dualpipe.interface import Batch, Phase, Values
from lightning_dualpipe.precision.weight_gradients import autocast_to

__all__ = ["MTP"]


class MTP(nn.Module):
    """One depth. As a layer of a pipeline it turns ``(h, h^1, .., h^(k-1), balance)`` into ``(.., h^k, balance)``."""

    in_high_precision = ("eh_proj",)  # as in the released weights

    def __init__(self, config: DeepSeekV3Config, rotary: Rotary, *, depth: int, recompute: Recompute = "none") -> None:
        super().__init__()
        self.depth = depth
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = MoEBlock(config, rotary, recompute=recompute)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h_BTD: Tensor, embedding_BTD: Tensor, balance_B: Tensor) -> tuple[Tensor, Tensor]:
        """``(h^k, balance_B)`` from h^(k-1) and the embeddings of the tokens k ahead, over the same T - k positions."""
        values = self.block(self.joined(h_BTD, embedding_BTD), balance_B)
        return self.norm(values[0]), values[1]

    def phases(self, embed_tokens: nn.Module) -> tuple[Phase, ...]:
        """``forward`` in pieces, which carry the shallower depths' hidden states along."""

        def join(*values: Tensor, batch: Batch) -> Values:
            *shallower, balance_B = values
            embedding_BTD = embed_tokens(batch["input_ids"][:, self.depth :])
            previous_BTD = shallower[-1][:, : embedding_BTD.shape[1]]
            return *shallower, self.joined(previous_BTD, embedding_BTD), balance_B

        def norm(h_BTD: Tensor, balance_B: Tensor) -> Values:
            return self.norm(h_BTD), balance_B

        inner = (*self.block.phases(), Phase("norm", norm))
        joined = compute_phase("join", join, self.block.recompute, takes_batch=True)
        return joined, *(_ahead(phase, self.depth) for phase in inner)

    def joined(self, h_BTD: Tensor, embedding_BTD: Tensor) -> Tensor:
        """The input of the block."""
        joined: Tensor = self.eh_proj(rebuilt(self._normed, h_BTD, embedding_BTD))
        return joined

    def _normed(self, h_BTD: Tensor, embedding_BTD: Tensor) -> Tensor:
        return autocast_to(torch.cat((self.enorm(embedding_BTD), self.hnorm(h_BTD)), dim=-1))


def _ahead(phase: Phase, depth: int) -> Phase:
    """``phase`` of depth ``depth``, which the hidden states of the shallower ones pass by."""

    def run(*values: object, batch: Batch) -> Values:
        out: Values = phase.run(*values, batch=ahead(batch, depth))
        return out

    return replace(phase.after(depth), run=run if phase.takes_batch else phase.run)
