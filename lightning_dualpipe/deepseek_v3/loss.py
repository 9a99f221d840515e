"""What a batch is trained on: next tokens, tokens further ahead, and even expert load.

    loss = sum CE  +  lambda / depths * sum over depths of sum CE_k  +  sum of balance losses

All are sums over tokens; whoever reports divides by the number of labels, also for depth k, which
has k positions less per sequence (technical report, eq. 24 and 25). Labels are already shifted:
``labels[:, i]`` follows token i, so depth k compares position i with ``labels[:, i + k]``.

Shapes: B sequences, T positions, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORED", "cross_entropy_sum", "loss_sums"]

IGNORED = -100
"""The label of a position that is not trained on."""

_CHUNK = 1 << 24  # logits that are widened to float32 at a time


def loss_sums(
    logits: Tensor, mtp_logits: Sequence[Tensor], balance_B: Tensor, labels_BT: Tensor, *, mtp_weight: float
) -> dict[str, Tensor]:
    """The sums of ``PipelineModel.loss``; ``mtp_*`` only where there are depths.

    ``mtp_agreement`` is how often a depth's greedy choice is what the main model will choose there: the
    share of a speculative draft that would be accepted. It is the rate of each sequence times its number of
    labels, so that the reported mean is the rate, whichever way sequences are spread over microbatches.
    """
    next_token = cross_entropy_sum(logits, labels_BT)
    balance = balance_B.sum()
    sums = {
        "loss": next_token + balance,
        "tokens": (labels_BT != IGNORED).sum(),
        "next_token_loss": next_token.detach(),
        "balance_loss": balance.detach(),
    }
    if mtp_logits:
        ahead = [cross_entropy_sum(at_k, labels_BT[:, k:]) for k, at_k in enumerate(mtp_logits, start=1)]
        mtp = torch.stack(ahead).sum() / len(ahead)
        sums["loss"] = sums["loss"] + mtp_weight * mtp
        sums["mtp_loss"] = mtp.detach()
        sums["mtp_agreement"] = _agreement(logits, mtp_logits, labels_BT)
    return sums


def cross_entropy_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of ``-log softmax(logits)[label]`` over positions that are not ignored, in at least float32.

    Keeps the logits and one number per row; half types are never widened as a whole.
    """
    total: Tensor = _CrossEntropy.apply(logits_BTV.flatten(0, -2), labels_BT.flatten())
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        normalizer_N = logits_NV.new_empty(len(logits_NV), dtype=dtype)
        for rows in _chunks(logits_NV):
            normalizer_N[rows] = logits_NV[rows].to(dtype).logsumexp(-1)
        counted_N = labels_N != IGNORED
        target_N1 = labels_N.where(counted_N, 0).unsqueeze(-1)
        ctx.save_for_backward(logits_NV, normalizer_N, target_N1, counted_N)
        return (normalizer_N - logits_NV.gather(-1, target_N1).squeeze(-1)).where(counted_N, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, normalizer_N, target_N1, counted_N = ctx.saved_tensors
        weight_N1 = torch.where(counted_N, grad, 0.0).unsqueeze(-1)
        grad_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            probability_NV = torch.sub(logits_NV[rows], normalizer_N[rows].unsqueeze(-1)).exp_().mul_(weight_N1[rows])
            grad_NV[rows] = probability_NV.scatter_add_(-1, target_N1[rows], -weight_N1[rows])
        return grad_NV, None


def _chunks(logits_NV: Tensor) -> list[slice]:
    size = max(1, _CHUNK // logits_NV.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits_NV), size)]


@torch.no_grad()
def _agreement(logits: Tensor, mtp_logits: Sequence[Tensor], labels_BT: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    main_BT = logits.argmax(-1)
    counted_BT = labels_BT != IGNORED
    rates = []
    for k, at_k in enumerate(mtp_logits, start=1):
        agrees_BT = (at_k.argmax(-1) == main_BT[:, k:]) & counted_BT[:, k:]
        rates.append(agrees_BT.sum(-1, dtype=dtype) / counted_BT[:, k:].sum(-1).clamp(min=1))
    return (torch.stack(rates).mean(0) * counted_BT.sum(-1)).sum()
