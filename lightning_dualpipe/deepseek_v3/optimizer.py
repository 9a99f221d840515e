"""The optimizer of the technical report (section 4.2): AdamW, which decays matrices alone, not norms and biases."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.bf16_adamw import BF16AdamW

__all__ = ["Moments", "build_optimizer", "check_moments"]

Moments = Literal["float32", "bfloat16"]


def check_moments(moments: str) -> None:
    """
    Raises:
        ConfigurationError: not one of ``Moments``.
    """
    if moments not in get_args(Moments):
        raise ConfigurationError(f"moments={moments!r} is neither 'float32' nor 'bfloat16'")


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    moments: Moments,
    fused: bool,
) -> Optimizer:
    """
    Args:
        parameters: those that are held here. A rank may hold none of a kind; an empty group keeps the numbering of
            groups equal on all ranks.
        fused: one kernel for all parameters, where moments are float32.
    """
    held = list(parameters)
    groups = [
        {"params": [each for each in held if each.ndim >= 2], "weight_decay": weight_decay},
        {"params": [each for each in held if each.ndim < 2], "weight_decay": 0.0},
    ]
    make = BF16AdamW if moments == "bfloat16" else partial(AdamW, fused=fused)
    optimizer: Optimizer = make(groups, lr=learning_rate, betas=betas)
    return optimizer
