"""The layers of a model over new tokens, with a cache of what came before.

The layers are the trained model's own; only their attention is run differently. Nothing of the state of a
training is touched: without gradients, routers do not count tokens.

Shapes: B sequences, S new positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.block import Block, MoEBlock
from lightning_dualpipe.deepseek_v3.generation.attention import attend, remember
from lightning_dualpipe.deepseek_v3.generation.cache import LatentCache, Places
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.mtp import MTP

__all__ = ["hidden_states", "mtp_hidden_state", "new_cache", "remember_mtp"]


def new_cache(model: Transformer, num_layers: int, num_sequences: int, *, max_slots: int) -> LatentCache:
    config, weight = model.config, model.lm_head.weight
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return LatentCache(num_layers, num_sequences, width, max_slots=max_slots, dtype=weight.dtype, device=weight.device)


def hidden_states(model: Transformer, tokens_BS: Tensor, places: Places, cache: LatentCache) -> Tensor:
    """``h_BSD`` of new tokens, after the final norm."""
    h_BSD = model.embed_tokens(tokens_BS)
    for index, block in enumerate(cast(Iterable[Block], model.blocks)):
        x_BSD = block.input_layernorm(h_BSD)
        entries = remember(block.self_attn, x_BSD, places, cache, index)
        h_BSD = h_BSD + attend(block.self_attn, x_BSD, places, entries)
        h_BSD = h_BSD + _feed_forward(block, block.post_attention_layernorm(h_BSD))
    return model.norm(h_BSD)


def remember_mtp(
    model: Transformer, mtp: MTP, h_BSD: Tensor, next_tokens_BS: Tensor, places: Places, cache: LatentCache
) -> tuple[Tensor, Tensor]:
    """Write what depth 1 will want to know of positions with hidden states ``h`` and the tokens that follow them.

    Keys and values of a single layer need nothing but its input. Returns that, and the entries to attend to.
    """
    joined_BSD = mtp.joined(h_BSD, model.embed_tokens(next_tokens_BS))
    x_BSD = mtp.block.input_layernorm(joined_BSD)
    return joined_BSD, remember(mtp.block.self_attn, x_BSD, places, cache, 0)


def mtp_hidden_state(mtp: MTP, joined_BSD: Tensor, places: Places, entries: Tensor) -> Tensor:
    """``h^1_BSD`` at positions that have been remembered."""
    block = mtp.block
    h_BSD = joined_BSD + attend(block.self_attn, block.input_layernorm(joined_BSD), places, entries)
    return mtp.norm(h_BSD + _feed_forward(block, block.post_attention_layernorm(h_BSD)))


def _feed_forward(block: Block, x_BSD: Tensor) -> Tensor:
    y: Tensor = block.mlp(x_BSD)[0] if isinstance(block, MoEBlock) else cast(torch.nn.Module, block.mlp)(x_BSD)
    return y
