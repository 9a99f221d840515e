"""Causal attention, ``softmax(scale q k^T) v`` where a position sees itself and what came before.

Accelerators run torch's fused kernels. Torch's own kernel for CPUs wants values as wide as queries,
which latent attention has not, and its fallback keeps all T x T probabilities. So on CPUs this file
goes through blocks of rows, a few heads at a time, which stay in a core's cache:

    keys ►       r0   r1                       forward    P = softmax(S), y = P v
    rows r0..r1  ████◣              S = q k^T  backward   P again,  dv += P^T g
                     ▲ masked to its right                dS = P (g v^T - rowsum),  dq = dS k,  dk += dS^T q

Only q, k and v are kept for backward. Half types are widened to float32 block by block.

Shapes: B sequences, T positions, H heads, C width of queries and keys, V of values; G heads of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["causal_attention"]

_ROWS = 64  # of a block: few, so that little is computed above the diagonal
_IN_CACHE = 1 << 17  # probabilities held at a time


def causal_attention(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """``y_BTHV``, in the dtype of ``v``; probabilities in at least float32."""
    if q_BTHC.device.type == "cpu":
        y_BTHV: Tensor = _Blockwise.apply(q_BTHC, k_BTHC, v_BTHV, scale)
        return y_BTHV
    q, k, v = (heads.transpose(1, 2) for heads in (q_BTHC, k_BTHC, v_BTHV))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHC: Tensor, k_BTHC: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q_BTHC, k_BTHC, v_BTHV)
        ctx.scale = scale
        y_BTHV = torch.empty_like(v_BTHV, memory_format=torch.contiguous_format)
        mask = _above_diagonal(q_BTHC)
        for group in _groups(q_BTHC):
            q, k, v = (_heads(x, group) for x in (q_BTHC, k_BTHC, v_BTHV))
            q = q * scale
            y = torch.empty_like(v, memory_format=torch.contiguous_format)
            for rows in _blocks(q):
                y[:, rows] = torch.bmm(_probabilities(q, k, rows, mask), v[:, : rows.stop])
            _heads(y_BTHV, group, widen=False).copy_(y)
        return y_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs = ctx.saved_tensors
        dq, dk, dv = grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        mask = _above_diagonal(inputs[0])
        for group in _groups(inputs[0]):
            q, k, v, g = (_heads(x, group) for x in (*inputs, grad_BTHV))
            for grad, own in zip(grads, _group_backward(q * ctx.scale, k, v, g, mask), strict=True):
                _heads(grad, group, widen=False).copy_(own)
        return dq.mul_(ctx.scale), dk, dv, None


def _group_backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled queries, keys and values [G, T, ..].

    No ``out=`` into slices: products of a batch are one call only where the result is contiguous.
    """
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _blocks(q):
        seen = slice(0, rows.stop)
        probabilities = _probabilities(q, k, rows, mask)
        dv[:, seen] += torch.bmm(probabilities.mT, g[:, rows])
        dp = torch.bmm(g[:, rows], v[:, seen].mT)
        ds = torch.ops.aten._softmax_backward_data(dp, probabilities, -1, dp.dtype)
        dq[:, rows] = torch.bmm(ds, k[:, seen])
        dk[:, seen] += torch.bmm(ds.mT, q[:, rows])
    return dq, dk, dv


def _probabilities(q: Tensor, k: Tensor, rows: slice, mask: Tensor) -> Tensor:
    scores = torch.bmm(q[:, rows], k[:, : rows.stop].mT)
    size = scores.shape[1]
    scores[:, :, rows.start :] += mask[:size, :size]
    return scores.softmax(-1)


def _groups(x_BTHC: Tensor) -> Iterator[tuple[int, slice]]:
    """(sequence, heads) of one pass."""
    num_sequences, num_positions, num_heads, _ = x_BTHC.shape
    size = min(num_heads, max(1, _IN_CACHE // (_ROWS * max(1, num_positions))))
    for sequence in range(num_sequences):
        for head in range(0, num_heads, size):
            yield sequence, slice(head, head + size)


def _heads(x_BTHC: Tensor, group: tuple[int, slice], *, widen: bool = True) -> Tensor:
    """``x_GTC`` of a group, a view unless it is widened."""
    sequence, heads = group
    x_GTC = x_BTHC[sequence, :, heads].transpose(0, 1)
    return x_GTC.to(torch.promote_types(x_GTC.dtype, torch.float32)) if widen else x_GTC


def _blocks(x_GTC: Tensor) -> list[slice]:
    num_positions = x_GTC.shape[1]
    return [slice(start, min(start + _ROWS, num_positions)) for start in range(0, num_positions, _ROWS)]


def _above_diagonal(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full((_ROWS, _ROWS), float("-inf"), dtype=dtype, device=x.device).triu(1)
