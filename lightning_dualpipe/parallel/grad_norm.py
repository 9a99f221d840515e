"""The norm of all gradients of a model that is spread over ranks, each parameter counted once.

    norm^p = sum over ranks, sum over their parameters:  |g|_p^p / holders

A parameter with n holders has the same summed gradient on each of them, so each contributes one
n-th. That is the whole bookkeeping, and one all-reduce of a scalar. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.parallel.replicas import ReplicaGroups

__all__ = ["clip_", "gradient_norm"]


@torch.no_grad()
def gradient_norm(
    parameters: Mapping[str, Tensor],
    replicas: ReplicaGroups,
    *,
    group: dist.ProcessGroup | None,
    norm_type: float = 2.0,
) -> Tensor:
    """The p-norm over the whole model: a float64 scalar, equal on all ranks of ``group`` (None: on this one).

    ``parameters`` by the names that ``replicas`` knows, with gradients summed over their holders.
    Each tensor's norm is accumulated in float32 (float64 gradients: in float64), their sum in float64.
    """
    assert norm_type > 0, f"norm_type {norm_type} is no norm"
    norms = {name: _norm(p.grad, norm_type) for name, p in parameters.items() if p.grad is not None}
    device = next((parameter.device for parameter in parameters.values()), _device(group))
    total = torch.zeros((), dtype=torch.float64, device=device)
    if math.isinf(norm_type):
        for norm in norms.values():
            total = torch.maximum(total, norm.to(device))
        return _reduced(total, dist.ReduceOp.MAX, group)
    for name, norm in norms.items():
        total += norm.to(device) ** norm_type / replicas.num_holders(name)
    return _reduced(total, dist.ReduceOp.SUM, group) ** (1 / norm_type)


@torch.no_grad()
def clip_(
    parameters: Mapping[str, Tensor],
    max_norm: float,
    replicas: ReplicaGroups,
    *,
    group: dist.ProcessGroup | None,
    norm_type: float = 2.0,
) -> Tensor:
    """Scale gradients by ``max_norm / (norm + 1e-6)`` if that is less than 1; returns the norm before.

    The formula is that of ``torch.nn.utils.clip_grad_norm_``.
    """
    norm = gradient_norm(parameters, replicas, group=group, norm_type=norm_type)
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)
    return norm


def _norm(gradient: Tensor, norm_type: float) -> Tensor:
    """In float64; accumulated in float32, of a float64 gradient in float64."""
    accumulate = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, norm_type, dtype=accumulate).double()


def _reduced(total: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(total, op=operation, group=group)
    return total


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a rank without parameters puts its part of the sum."""
    nccl = group is not None and dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
