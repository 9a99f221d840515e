"""A decoder block, cut into phases that only compute or only communicate.

    dense   h ─► attend ─► feed_forward ─► h
    MoE     h ─► attend ─┬─ dispatch ══► experts ─► combine ══► add ─► h         ══ may cross ranks
                         └─ shared_experts ─────────────────────┘

``attend`` holds attention, its norm, the router and what the router sees, normed. The shared experts
need nothing of what travels, so they can run while it does, forward and backward.

A pipeline runs a phase of one microbatch while another one's communicates (technical report,
figure 4); ``forward`` is their composition. The sequence-wise balance loss rides along with the
hidden state, each layer adding its own.

Shapes: B sequences, T positions, D hidden, N = B T tokens, K experts per token, R rows at experts.
``rows`` and ``weights`` lie as the dispatcher packed them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.attention import Attention
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.mlp import MLP
from lightning_dualpipe.deepseek_v3.moe import MoE
from lightning_dualpipe.deepseek_v3.norm import RMSNorm
from lightning_dualpipe.deepseek_v3.padding import MASK
from lightning_dualpipe.deepseek_v3.recompute import Recompute, compute_phase, kept_in_fp8, rebuildable, rebuilt
from lightning_dualpipe.deepseek_v3.rope import Rotary
from lightning_dualpipe.interface import Batch, Flight, Phase, Values
from lightning_dualpipe.parallel.dispatch import Routing
from lightning_dualpipe.precision.weight_gradients import autocast_to

__all__ = ["Block", "DenseBlock", "MoEBlock"]


class Block(nn.Module, ABC):
    """``(h_BTD, balance_B) -> (h_BTD, balance_B)``."""

    def __init__(self, config: DeepSeekV3Config, rotary: Rotary, *, recompute: Recompute = "none") -> None:
        super().__init__()
        self.recompute: Recompute = recompute
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rotary)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The block in pieces; each takes what the one before returns."""

    def forward(self, h_BTD: Tensor, balance_B: Tensor) -> Values:
        values: Values = (h_BTD, balance_B)
        for phase in self.phases():
            values = phase(values, {})
        return values

    def _attended(self, h_BTD: Tensor) -> Tensor:
        """The hidden state after attention."""
        return h_BTD + self.self_attn(rebuilt(self.input_layernorm, h_BTD))


class DenseBlock(Block):
    def __init__(self, config: DeepSeekV3Config, rotary: Rotary, *, recompute: Recompute = "none") -> None:
        super().__init__(config, rotary, recompute=recompute)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def phases(self) -> tuple[Phase, ...]:
        return (
            compute_phase("attend", self._attend, self.recompute),
            compute_phase("feed_forward", self._feed_forward, self._recompute_feed_forward()),
        )

    def _attend(self, h_BTD: Tensor, balance_B: Tensor) -> Values:
        return self._attended(h_BTD), balance_B

    def _feed_forward(self, h_BTD: Tensor, balance_B: Tensor) -> Values:
        return h_BTD + self.mlp(rebuilt(self.post_attention_layernorm, h_BTD)), balance_B

    def _recompute_feed_forward(self) -> Recompute:
        """Nothing in FP8: the report keeps so what is in mixtures of experts."""
        return "selective" if self.recompute == "selective_fp8" else self.recompute


class MoEBlock(Block):
    def __init__(self, config: DeepSeekV3Config, rotary: Rotary, *, recompute: Recompute = "none") -> None:
        super().__init__(config, rotary, recompute=recompute)
        self.mlp = MoE(config)

    def phases(self) -> tuple[Phase, ...]:
        return (
            compute_phase("attend", self._attend, self.recompute, takes_batch=True),
            Phase("dispatch", self._sent, launch=self._send, takes=3, has_peers=self._crosses_ranks),
            compute_phase("shared_experts", self._shared_experts, self.recompute, skips=3, takes=2),
            compute_phase("experts", self._experts, self.recompute, takes=3),
            Phase("combine", self._sent_back, launch=self._send_back, takes=2, has_peers=self._crosses_ranks),
            Phase("add", self._add),
        )

    def _attend(self, h_BTD: Tensor, balance_B: Tensor, batch: Batch) -> Values:
        h_BTD = self._attended(h_BTD)
        x_BTD = rebuilt(self.post_attention_layernorm, h_BTD)
        weights_NK, experts_NK, own_B = self.mlp.gate(x_BTD, batch.get(MASK))
        packed = self.mlp.dispatcher.pack(self.mlp.to_experts(x_BTD.flatten(0, 1)), weights_NK, experts_NK)
        return *packed, h_BTD, x_BTD, balance_B + own_B

    def _shared_experts(self, h_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        x_BTD = rebuildable(x_BTD, self.post_attention_layernorm, h_BTD)  # made in another phase
        return h_BTD + self.mlp.shared_experts(x_BTD)

    def _experts(self, rows: Tensor, weights: Tensor, plan: Any) -> Values:
        x_RD, weights_R, routing = self.mlp.dispatcher.unpack(rows, weights, plan)
        if self.mlp.token_format is not None:
            x_RD = kept_in_fp8(autocast_to(x_RD), self.mlp.token_format)
        y_RD = self.mlp.experts(x_RD, weights_R, routing.counts_E)
        return self.mlp.dispatcher.gather(y_RD, routing), routing

    def _add(self, rows: Tensor, routing: Routing, h_BTD: Tensor, balance_B: Tensor) -> Values:
        y_ND = self.mlp.from_experts(self.mlp.dispatcher.collect(rows, routing))
        return h_BTD + y_ND.view_as(h_BTD), balance_B

    # The dispatcher is looked up when a phase runs: a strategy replaces it after it has cut the model.

    def _send(self, *packed: Any) -> Flight:
        return self.mlp.dispatcher.send(*packed)

    def _sent(self, *packed: Any) -> Values:
        return self.mlp.dispatcher.sent(*packed)

    def _send_back(self, *gathered: Any) -> Flight:
        return self.mlp.dispatcher.send_back(*gathered)

    def _sent_back(self, *gathered: Any) -> Values:
        return self.mlp.dispatcher.sent_back(*gathered)

    def _crosses_ranks(self) -> bool:
        return self.mlp.dispatcher.crosses_ranks
