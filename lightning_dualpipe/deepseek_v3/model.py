"""DeepSeek-V3 on one device, and the list of layers by which a pipeline cuts it.

    input_ids ─► embed_tokens ─► blocks.0 ─► … ─► blocks.L-1 ─► norm ─► mtp.0 ─► … ─► lm_head ─► logits, loss
                                                                └───── never cut apart ─────┘

Between layers pass ``(h_BTD, balance_B)``: the hidden state, and the balance losses of the routers
so far. Multi-token prediction modules append their hidden states and use the embedding and the head
of the main model; ``DualPipe`` holds all of these on one rank, other pipelines keep a copy.

Shapes: B sequences, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.block import Block, DenseBlock, MoEBlock
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.count import forward_flops
from lightning_dualpipe.deepseek_v3.init import initialize
from lightning_dualpipe.deepseek_v3.loss import IGNORED, loss_sums
from lightning_dualpipe.deepseek_v3.moe import MoE
from lightning_dualpipe.deepseek_v3.mtp import MTP
from lightning_dualpipe.deepseek_v3.norm import RMSNorm
from lightning_dualpipe.deepseek_v3.padding import MASK, PaddingCheck
from lightning_dualpipe.deepseek_v3.recompute import Recompute
from lightning_dualpipe.deepseek_v3.rope import Rotary
from lightning_dualpipe.deepseek_v3.router import Router
from lightning_dualpipe.interface import Batch, Layer, Phase, TensorSpec, Values, run_uncut
from lightning_dualpipe.recompute import run_phase

__all__ = ["Transformer"]

_COST_LENGTH = 4096  # positions for which layers are weighed against each other: the pretraining length


class Transformer(nn.Module):
    """A ``PipelineModel``. Under ``torch.device("meta")`` it takes no memory; else it comes with initial weights."""

    in_high_precision = ("lm_head",)

    def __init__(self, config: DeepSeekV3Config, *, seed: int = 0, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.mtp_loss_weight = config.mtp_loss_weight  # may change in the course of a training
        self.padding = PaddingCheck()
        device = torch.get_default_device()
        with torch.device("meta"):  # no module initialises itself
            self._build(config, Rotary(config), recompute)
        if device.type != "meta":
            self.to_empty(device=device)
            self.initialize_weights(seed)

    def _build(self, config: DeepSeekV3Config, rotary: Rotary, recompute: Recompute) -> None:
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = (MoEBlock if config.is_moe(index) else DenseBlock for index in range(config.num_hidden_layers))
        self.blocks = nn.ModuleList(kind(config, rotary, recompute=recompute) for kind in kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        depths = range(1, config.num_nextn_predict_layers + 1)
        self.mtp = nn.ModuleList(MTP(config, rotary, depth=depth, recompute=recompute) for depth in depths)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()

    def forward(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        """``{"input_ids": [B, T]}`` -> logits [B, T, V]; with ``"labels"`` [B, T] -> means over tokens, with "loss".

        Shorter sequences may be filled up on the right, ``"attention_mask"`` [B, T] then says where (``padding``).
        """
        return run_uncut(self, batch, run_phase)

    def layers(self) -> Sequence[Layer]:
        config = self.config
        flops = forward_flops(config, min(_COST_LENGTH, config.max_position_embeddings))
        small = 2.0 * config.hidden_size  # of the lookup and the norm: little, but no layer is free
        layers = [Layer("embed_tokens", (Phase("embed", self._embed),), (self.embed_tokens,), small)]
        for index, block in enumerate(cast(Iterable[Block], self.blocks)):
            cost = flops.moe_block if config.is_moe(index) else flops.dense_block
            layers.append(Layer(f"blocks.{index}", block.phases(), (block,), cost))
        layers.append(Layer("norm", (Phase("norm", self._norm),), (self.norm,), small))
        for index, mtp in enumerate(cast(Iterable[MTP], self.mtp)):
            phases, used = mtp.phases(self.embed_tokens), (mtp, self.embed_tokens)
            layers.append(Layer(f"mtp.{index}", phases, used, flops.mtp, with_previous=True, for_loss=True))
        tied = (self.embed_tokens,) if config.tie_word_embeddings else ()
        cost = flops.head * (1 + len(self.mtp))
        layers.append(Layer("lm_head", (Phase("head", self._head),), (self.lm_head, *tied), cost, with_previous=True))
        return layers

    def inputs(self, batch: Batch) -> Tensor:
        self.padding(batch)
        return batch["input_ids"]

    def boundary(self, batch: Batch) -> Sequence[TensorSpec]:
        num_sequences, length = batch["input_ids"].shape
        hidden = TensorSpec((num_sequences, length, self.config.hidden_size))
        return hidden, TensorSpec((num_sequences,), self._loss_dtype())

    def loss(self, values: Values, batch: Batch) -> Mapping[str, Tensor]:
        logits, *mtp_logits, balance_B = values
        labels_BT = batch["labels"]
        if MASK in batch:
            labels_BT = labels_BT.where(batch[MASK] != 0, IGNORED)
        return loss_sums(logits, mtp_logits, balance_B, labels_BT, mtp_weight=self.mtp_loss_weight)

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Name and router of every mixture of experts held here, those of multi-token prediction included."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Router))

    def forget_load(self) -> None:
        """Count the tokens of experts from zero again, without moving any bias."""
        for _, router in self.routers():
            router.tokens_per_expert.zero_()

    def mixtures(self) -> Iterator[tuple[str, MoE]]:
        """Name and mixture of experts, in the same order."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, MoE))

    def initialize_weights(self, seed: int = 0) -> None:
        """Fill what is held here with numbers that depend on (seed, name) only."""
        self._tie()
        initialize(self, seed=seed, std=self.config.initializer_range)

    def _embed(self, input_ids_BT: Tensor) -> Values:
        h_BTD = self.embed_tokens(input_ids_BT)
        return h_BTD, h_BTD.new_zeros(len(h_BTD), dtype=self._loss_dtype())

    def _norm(self, h_BTD: Tensor, balance_B: Tensor) -> Values:
        return self.norm(h_BTD), balance_B

    def _head(self, *values: Tensor) -> Values:
        *hidden, balance_B = values
        return *(self.lm_head(h_BTD) for h_BTD in hidden), balance_B

    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def _tie(self) -> None:
        embedding, head = self.embed_tokens, self.lm_head
        if self.config.tie_word_embeddings and isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear):
            head.weight = embedding.weight  # either may be on another rank

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._tie()  # leaving the meta device makes a new parameter of each name
        return self
