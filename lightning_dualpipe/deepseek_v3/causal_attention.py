"""Causal attention, ``softmax(scale q k^T) v`` where a position sees itself and what came before.

Accelerators run torch's fused kernels. Torch's own kernel for CPUs wants values as wide as queries,
which latent attention has not, and its fallback keeps all T x T probabilities. So on CPUs this file
goes through blocks of rows, a few heads at a time, which stay in a core's cache:

    keys ►       r0   r1                       forward    P = softmax(S), y = P v
    rows r0..r1  ████◣              S = q k^T  backward   dv += P^T g,  dS = P (g v^T - rowsum),
                     ▲ masked to its right                dq = dS k,  dk += dS^T q

Backward computes P again from q and k, but for short sequences, whose P is no larger than the other
things a layer keeps, unless the caller wants that memory. Half types are widened to float32 block by block.

Shapes: B sequences, T positions, H heads, C width of queries and keys, V of values; G heads of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dualpipe.precision.weight_gradients import without_autocast

__all__ = ["causal_attention"]

_ROWS = 64  # of a block: few, so that little is computed above the diagonal
_IN_CACHE = 1 << 17  # probabilities computed at a time
_SHORT = 256  # positions of a sequence whose probabilities are kept


def causal_attention(
    q_BTHC: Tensor, k_BTHC: Tensor, v_BTHV: Tensor, scale: float, *, keep_short: bool = True
) -> Tensor:
    """``y_BTHV``, in the dtype of ``v``; probabilities in at least float32."""
    if q_BTHC.device.type == "cpu":
        with without_autocast(q_BTHC):
            y_BTHV: Tensor = _Blockwise.apply(q_BTHC, k_BTHC, v_BTHV, scale, keep_short)
        return y_BTHV
    q, k, v = (heads.transpose(1, 2) for heads in (q_BTHC, k_BTHC, v_BTHV))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHC: Tensor, k_BTHC: Tensor, v_BTHV: Tensor, scale: float, keep_short: bool) -> Tensor:
        y_BTHV = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
        mask, blocks = _above_diagonal(q_BTHC), _blocks(q_BTHC.shape[1])
        kept: list[Tensor] = []
        for group in _groups(q_BTHC):
            q, k, v = (_wide(_heads(x, group)) for x in (q_BTHC, k_BTHC, v_BTHV))
            q, y = q * scale, _heads(y_BTHV, group)
            for rows in blocks:
                probabilities = _probabilities(q, k, rows, mask)
                y[:, rows] = torch.bmm(probabilities, v[:, : rows.stop])
                if keep_short and q_BTHC.shape[1] <= _SHORT:
                    kept.append(probabilities)
        ctx.save_for_backward(q_BTHC, k_BTHC, v_BTHV, *kept)
        ctx.scale = scale
        return y_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BTHC, k_BTHC, v_BTHV, *kept = ctx.saved_tensors
        inputs = q_BTHC, k_BTHC, v_BTHV
        dq_BTHC, dk_BTHC, dv_BTHV = grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        mask, blocks = _above_diagonal(grad_BTHV), _blocks(grad_BTHV.shape[1])
        for index, group in enumerate(_groups(grad_BTHV)):
            q, k, v, g = (_wide(_heads(x, group)) for x in (*inputs, grad_BTHV))
            q = q * ctx.scale
            known = kept[index * len(blocks) :][: len(blocks)][::-1]
            probabilities = known or (_probabilities(q, k, rows, mask) for rows in reversed(blocks))
            _group_backward(q, k, v, g, blocks, probabilities, [_heads(grad, group) for grad in grads])
        return dq_BTHC.mul_(ctx.scale), dk_BTHC, dv_BTHV, None, None


def _group_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    blocks: list[slice],
    probabilities: Iterable[Tensor],
    grads: list[Tensor],
) -> None:
    """Write the gradients of scaled queries, keys and values [G, T, ..] into ``grads``.

    No ``out=`` into slices: products of a batch are one call only where the result is contiguous. The last
    block comes first because it sees all keys, so that the others add to what it returns.
    """
    dq, dk, dv = grads
    sums: tuple[Tensor, Tensor] | None = None
    for rows, p in zip(reversed(blocks), probabilities, strict=True):
        dp = torch.bmm(g[:, rows], v[:, : rows.stop].mT)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        dq[:, rows] = torch.bmm(ds, k[:, : rows.stop])
        own = torch.bmm(ds.mT, q[:, rows]), torch.bmm(p.mT, g[:, rows])
        if sums is None:
            sums = own
        else:
            for total, part in zip(sums, own, strict=True):
                total[:, : rows.stop].add_(part)
    if sums is not None:
        dk.copy_(sums[0])
        dv.copy_(sums[1])


def _probabilities(q: Tensor, k: Tensor, rows: slice, mask: Tensor) -> Tensor:
    scores = torch.bmm(q[:, rows], k[:, : rows.stop].mT)
    size = scores.shape[1]
    scores[:, :, rows.start :].add_(mask[:size, :size])
    return scores.softmax(-1)


def _groups(x_BTHC: Tensor) -> Iterator[tuple[int, slice]]:
    """(sequence, heads) of one pass."""
    num_sequences, num_positions, num_heads, _ = x_BTHC.shape
    if num_positions == 0:
        return
    size = min(num_heads, max(1, _IN_CACHE // (_ROWS * num_positions)))
    for sequence in range(num_sequences):
        for head in range(0, num_heads, size):
            yield sequence, slice(head, head + size)


def _heads(x_BTHC: Tensor, group: tuple[int, slice]) -> Tensor:
    """``x_GTC``, a view."""
    sequence, heads = group
    return x_BTHC[sequence, :, heads].transpose(0, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(num_positions: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, num_positions)) for start in range(0, num_positions, _ROWS)]


def _above_diagonal(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full((_ROWS, _ROWS), float("-inf"), dtype=dtype, device=x.device).triu(1)
