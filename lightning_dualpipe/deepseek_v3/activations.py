"""How many bytes a token leaves in a layer for its backward, without building the layer.

    671b in bfloat16, bytes per token        none   selective   selective_fp8        full
    dense block                           372,880     139,408         139,408      28,672
    block with experts                    517,528     255,384         219,672     157,920
      whose tokens come in FP8            517,528     255,384         164,120     157,920
    depth of multi-token prediction       589,220     298,404         262,692     186,596

What fills a layer is the table of ``recompute``: rows for experts are there K times per token, and
only they cannot be computed again without another exchange. Between phases a pipeline also holds the
normed hidden state of a block with experts, which is sent: D elements more under ``selective``.

For attention that keeps no probabilities, which on CPUs is from 257 positions on. Expert rows are
those of even routing. Indices, affinities and the statistics of norms are counted; constants of a
sequence are not.

Letters: D hidden, H heads, C width of queries and keys, V of values, E experts, K of them chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.recompute import Recompute

__all__ = ["KeptBytes", "kept_bytes"]

_INDEX = 8  # bytes, int64


@dataclass(frozen=True, slots=True)
class KeptBytes:
    """Per token, by what a layer is. The hidden state that enters a layer belongs to it."""

    dense_block: float
    moe_block: float
    mtp: float  # one depth, without the pass through the head


def kept_bytes(
    config: DeepSeekV3Config, recompute: Recompute = "none", *, element: int = 2, fp8_tokens: bool = False
) -> KeptBytes:
    """``element``: bytes of a number in the dtype of the model; ``fp8_tokens``: whether tokens travel in FP8."""
    wide = max(element, 4)  # affinities and statistics are in at least float32
    rows = _in_fp8(config.hidden_size) if fp8_tokens and recompute == "selective_fp8" else config.hidden_size * element
    moe = _moe_block(config, recompute, element, wide, rows)
    hidden = config.hidden_size
    # the embedding, two norms side by side, what the last norm sees, and what it makes, which the head keeps
    joined = {"none": 5 * hidden, "full": 2 * hidden}.get(recompute, 3 * hidden)
    return KeptBytes(
        dense_block=_dense_block(config, recompute, element, wide),
        moe_block=moe,
        mtp=moe + joined * element + (1 if recompute == "full" else 3) * wide,
    )


def _dense_block(config: DeepSeekV3Config, recompute: Recompute, element: int, wide: int) -> float:
    hidden, inner = config.hidden_size, config.intermediate_size
    if recompute == "full":
        return 2 * hidden * element  # what enters attention and what enters the feed-forward network
    normed = hidden if recompute == "none" else 0
    gated = (3 if recompute == "none" else 2) * inner  # gate and up, and their product unless it is rebuilt
    feed_forward = (hidden + normed + gated) * element + wide
    return _attention(config, recompute, element, wide) + feed_forward


def _moe_block(config: DeepSeekV3Config, recompute: Recompute, element: int, wide: int, rows: int) -> float:
    hidden, chosen, inner = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
    sent = chosen * (rows + wide)  # rows at the experts, and their weights
    if recompute == "full":
        states = 3 if config.n_shared_experts else 1  # the shared experts' inputs are two
        return states * hidden * element + sent + 3 * chosen * _INDEX  # the routing is a value between phases
    experts = (chosen + config.n_shared_experts) * 2 * inner * element  # gate and up
    if recompute == "none":
        experts += (chosen + config.n_shared_experts) * inner * element  # and their product
    elif recompute == "selective_fp8":  # side by side of routed experts, each by itself of the shared
        experts = chosen * _in_fp8(2 * inner) + 2 * _in_fp8(config.n_shared_experts * inner)
    copies = [element] if config.n_shared_experts or wide == element else []  # of the normed hidden state
    copies += [wide] if wide > element else []  # for the router
    normed = hidden * sum(copies) if recompute == "none" else 0
    affinities = (config.n_routed_experts + 1) * wide  # and a row's sum, for the balance loss
    weights = (chosen + 1) * wide if config.norm_topk_prob else 0
    routing = affinities + weights + 3 * chosen * _INDEX  # experts, and the order of rows both ways
    feed_forward = hidden * element + wide + normed + routing + sent + experts
    return _attention(config, recompute, element, wide) + feed_forward


def _in_fp8(width: int) -> int:
    """Bytes of a row: its values, and a float32 for every 128 of them."""
    return width + 4 * -(-width // 128)


def _attention(config: DeepSeekV3Config, recompute: Recompute, element: int, wide: int) -> float:
    heads, queries = config.num_attention_heads, config.num_attention_heads * config.qk_head_dim
    latent, rank = config.kv_lora_rank, config.q_lora_rank
    kept = config.hidden_size + latent + config.qk_rope_head_dim + heads * config.v_head_dim  # the last: attended
    kept += queries if rank is None else rank
    if recompute == "none":
        keys_and_values = heads * (config.qk_nope_head_dim + config.v_head_dim)  # values are a view of it
        kept += config.hidden_size + latent + keys_and_values + queries
        kept += 0 if rank is None else rank + queries
    statistics = 2 if rank is None else 3
    return kept * element + statistics * wide
