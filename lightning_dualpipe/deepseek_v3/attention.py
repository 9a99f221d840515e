"""Multi-head latent attention (technical report, section 2.1.1, eq. 1-11).

             ┌─ q_a ─ norm ─ q_b ─┐ (or q_proj)        per head
    x_BTD ───┤                    └──────────► q  [ nope | rope ]──────┐
             │                                                         ├─ softmax(q k / scale) v ─ o_proj ─►
             └─ kv_a ──┬─ norm ─ kv_b ───────► k  [ nope | rope ], v ──┘
                       └─ one rope key for all heads ────┘

Keys and values of all heads are one latent of width ``kv_lora_rank`` per token, which is what an
inference engine would cache, and a rotary key that the heads share. No norm is applied to that key.
This is the form for training, with keys and values written out.

Shapes: B sequences, T positions, D hidden, H heads, and per head N nope, R rope, V value dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.causal_attention import causal_attention
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.norm import RMSNorm
from lightning_dualpipe.deepseek_v3.recompute import forgets, rebuilt
from lightning_dualpipe.deepseek_v3.rope import Rotary, softmax_scale
from lightning_dualpipe.precision.weight_gradients import autocast_to

__all__ = ["Attention"]

_LATENT_EPS = 1e-6  # of the norms between down- and up-projection, whatever ``rms_norm_eps`` says (as transformers)


class Attention(nn.Module):
    def __init__(self, config: DeepSeekV3Config, rotary: Rotary) -> None:
        super().__init__()
        self.rotary = rotary
        self.scale = softmax_scale(config)
        self.num_heads = config.num_attention_heads
        self.kv_rank = config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, _LATENT_EPS)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, hidden, bias=bias)
        self.compressed_queries = config.q_lora_rank is not None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = rebuilt(autocast_to, x_BTD)  # one copy for both
        latent_BTC, shared_key_BTR = self.kv_a_proj_with_mqa(x_BTD).split([self.kv_rank, self.rope], dim=-1)
        latent_BTC = rebuilt(_operand_of(self.kv_a_layernorm), latent_BTC)
        k_BTHC, v_BTHV = rebuilt(self._keys_and_values, latent_BTC, shared_key_BTR)
        q_BTHC = self._queries(x_BTD)
        y_BTHV = causal_attention(q_BTHC, k_BTHC, v_BTHV, self.scale, keep_short=not forgets())
        return self.o_proj(y_BTHV.flatten(-2))

    def _keys_and_values(self, latent_BTC: Tensor, shared_key_BTR: Tensor) -> tuple[Tensor, Tensor]:
        kv_BTHC = self.kv_b_proj(latent_BTC).unflatten(-1, (self.num_heads, -1))
        k_nope_BTHN, v_BTHV = kv_BTHC.split([self.nope, self.value], dim=-1)
        k_rope_BTHR = self.rotary(shared_key_BTR.unsqueeze(-2)).expand(*k_nope_BTHN.shape[:-1], -1)
        return torch.cat((k_nope_BTHN, k_rope_BTHR), dim=-1), v_BTHV

    def _queries(self, x_BTD: Tensor) -> Tensor:
        if not self.compressed_queries:
            return self._turned(self.q_proj(x_BTD))  # kept: no narrow latent to rebuild it from
        latent_BTQ = rebuilt(_operand_of(self.q_a_layernorm), self.q_a_proj(x_BTD))
        return rebuilt(self._up_queries, latent_BTQ)

    def _up_queries(self, latent_BTQ: Tensor) -> Tensor:
        return self._turned(self.q_b_proj(latent_BTQ))

    def _turned(self, q: Tensor) -> Tensor:
        q_nope_BTHN, q_rope_BTHR = q.unflatten(-1, (self.num_heads, -1)).split([self.nope, self.rope], dim=-1)
        return torch.cat((q_nope_BTHN, self.rotary(q_rope_BTHR)), dim=-1)


def _operand_of(norm: RMSNorm) -> Callable[[Tensor], Tensor]:
    """``norm`` and the cast that autocast would make of its output, so that no wider copy is between them."""
    return lambda x: autocast_to(norm(x))
