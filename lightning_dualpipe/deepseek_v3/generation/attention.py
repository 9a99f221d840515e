"""Latent attention of new tokens to all that a cache holds, in two forms with one result.

    absorbed    (q W_UK) · latent             keys and values are never written out: W_UK goes to the query,
                (softmax · latent) W_UV       W_UV comes after the sum over positions
    expanded    q · (W_UK latent)             keys and values of a few heads at a time are written out
                softmax · (W_UV latent)

For a head, S queries that see K slots cost

    absorbed    S K (2 C + R)  +  S C (N + V)       few queries: decoding
    expanded    S K (N + R + V)  +  K C (N + V)     many: the chunks of a prompt

products (technical report, section 2.1.1; arXiv:2405.04434, section 2.1). The cheaper form is taken.
Scores are computed a block at a time, in at least float32.

Shapes: B sequences, S queries, K slots, D hidden, H heads, G heads of a group, C latent, W = C + R, and per head
N nope, R rope, V value dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.attention import Attention
from lightning_dualpipe.deepseek_v3.generation.cache import LatentCache, Places
from lightning_dualpipe.precision.weight_gradients import without_autocast

__all__ = ["attend", "is_absorbed_cheaper", "remember"]

_AT_A_TIME = 1 << 22
"""Scores of a block: 16 MB of float32."""


def remember(attention: Attention, x_BSD: Tensor, places: Places, cache: LatentCache, layer: int) -> Tensor:
    """Write what ``attention`` will want to know of new tokens; returns all entries it may see [B, K, W]."""
    latent_BSC, key_BSR = attention.kv_a_proj_with_mqa(x_BSD).split([attention.kv_rank, attention.rope], dim=-1)
    latent_BSC = attention.kv_a_layernorm(latent_BSC)
    turned_BSR = attention.rotary.at(key_BSR.unsqueeze(-2), places.positions_BS, places.limit).squeeze(-2)
    return cache.write(layer, torch.cat((latent_BSC, turned_BSR), dim=-1), places)


def attend(attention: Attention, x_BSD: Tensor, places: Places, entries_BKW: Tensor) -> Tensor:
    """Attention's output [B, S, D] for tokens that have been remembered."""
    q_BSHN, q_BSHR = _queries(attention, x_BSD, places)
    with without_autocast(x_BSD):
        # in the precision of the cache: under autocast that is more than the operands have
        q_BSHN, q_BSHR = (q.to(entries_BKW.dtype) * attention.scale for q in (q_BSHN, q_BSHR))
        form = _absorbed if is_absorbed_cheaper(attention, x_BSD.shape[1], entries_BKW.shape[1]) else _expanded
        y_BSHV = form(attention, q_BSHN, q_BSHR, entries_BKW, places.positions_BS)
    return attention.o_proj(y_BSHV.flatten(-2))


def is_absorbed_cheaper(attention: Attention, num_queries: int, num_slots: int) -> bool:
    latent, rope, plain = attention.kv_rank, attention.rope, attention.nope + attention.value
    absorbed = num_queries * (num_slots * (2 * latent + rope) + latent * plain)
    expanded = num_slots * (num_queries * (plain + rope) + latent * plain)
    return absorbed <= expanded


def _queries(attention: Attention, x_BSD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    if attention.compressed_queries:
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x_BSD)))
    else:
        q = attention.q_proj(x_BSD)
    q_BSHN, q_BSHR = q.unflatten(-1, (attention.num_heads, -1)).split([attention.nope, attention.rope], dim=-1)
    return q_BSHN, attention.rotary.at(q_BSHR, places.positions_BS, places.limit)


def _up_projections(attention: Attention, like: Tensor) -> tuple[Tensor, Tensor]:
    """W_UK [H, N, C] and W_UV [H, V, C], views of ``kv_b_proj``."""
    weight_HOC = attention.kv_b_proj.weight.to(like.dtype).unflatten(0, (attention.num_heads, -1))
    up_HNC, up_HVC = weight_HOC.split([attention.nope, attention.value], dim=1)
    return up_HNC, up_HVC


def _absorbed(
    attention: Attention, q_BSHN: Tensor, q_BSHR: Tensor, entries_BKW: Tensor, positions_BS: Tensor
) -> Tensor:
    """All heads share one key, the entry, and one value, its latent: their queries are rows of one matrix."""
    up_HNC, up_HVC = _up_projections(attention, entries_BKW)
    q_BSHW = torch.cat((torch.einsum("bshn,hnc->bshc", q_BSHN, up_HNC), q_BSHR), dim=-1)
    rows_of_heads = positions_BS.repeat_interleave(attention.num_heads, dim=1)
    latent_BKC = entries_BKW[..., : attention.kv_rank]
    y = _weighted_sums(q_BSHW.flatten(1, 2), entries_BKW, latent_BKC, rows_of_heads)
    return torch.einsum("bshc,hvc->bshv", y.unflatten(1, (-1, attention.num_heads)), up_HVC)


def _expanded(
    attention: Attention, q_BSHN: Tensor, q_BSHR: Tensor, entries_BKW: Tensor, positions_BS: Tensor
) -> Tensor:
    up_HNC, up_HVC = _up_projections(attention, entries_BKW)
    num_sequences, num_queries, num_heads, _ = q_BSHN.shape
    y_BSHV = q_BSHN.new_empty(num_sequences, num_queries, num_heads, attention.value)
    latent_BKC, key_BKR = entries_BKW.split([attention.kv_rank, attention.rope], dim=-1)
    # so many heads that their keys and values are no larger than a block of scores
    size = max(1, _AT_A_TIME // (num_sequences * latent_BKC.shape[1] * (attention.nope + attention.value)))
    for head in range(0, num_heads, size):
        group = slice(head, head + size)
        k_BGKN = torch.einsum("bkc,gnc->bgkn", latent_BKC, up_HNC[group])
        v_BGKV = torch.einsum("bkc,gvc->bgkv", latent_BKC, up_HVC[group])
        shared_BGKR = key_BKR.unsqueeze(1).expand(*k_BGKN.shape[:-1], -1)
        k = torch.cat((k_BGKN, shared_BGKR), dim=-1).flatten(0, 1)
        q = torch.cat((q_BSHN[:, :, group], q_BSHR[:, :, group]), dim=-1).transpose(1, 2).flatten(0, 1)
        rows = positions_BS.repeat_interleave(k_BGKN.shape[1], dim=0)
        y = _weighted_sums(q, k, v_BGKV.flatten(0, 1), rows)
        y_BSHV[:, :, group] = y.unflatten(0, (num_sequences, -1)).transpose(1, 2)
    return y_BSHV


def _weighted_sums(q_ZSX: Tensor, k_ZKX: Tensor, v_ZKY: Tensor, positions_ZS: Tensor) -> Tensor:
    """``softmax(q k^T) v`` [Z, S, Y] over the slots up to each query's position, in the dtype of ``v``."""
    y_ZSY = v_ZKY.new_empty(*q_ZSX.shape[:2], v_ZKY.shape[-1])
    wide = torch.promote_types(v_ZKY.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_ZSX, k_ZKX, v_ZKY))
    slots_K = torch.arange(k.shape[1], device=k.device)
    size = max(1, _AT_A_TIME // max(1, len(k) * k.shape[1]))
    for start in range(0, q.shape[1], size):
        rows = slice(start, start + size)
        scores_ZSK = torch.bmm(q[:, rows], k.mT)
        scores_ZSK.masked_fill_(slots_K > positions_ZS[:, rows, None], float("-inf"))
        y_ZSY[:, rows] = torch.bmm(scores_ZSK.softmax(-1), v)
    return y_ZSY
