"""AdamW whose moments are kept in bfloat16 (DeepSeek-V3 report, section 3.3.3): 4 bytes a parameter instead of 8.

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w = w - lr (weight_decay w + m' / (sqrt(v') + eps))        m', v' without the bias of their start

Everything is computed in float32 (float64 for float64 parameters); m and v are rounded once, when they are put away.
The update uses them before that. bfloat16 has 8 significant bits: a moment that changes by less than 1/256 a step
would not change at all, so that betas close to 1 are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["BF16AdamW"]

_LARGEST_BETA = 0.98  # 1/50 of a moment is new with each step: several of its last places


class BF16AdamW(Optimizer):
    """
    Raises:
        ConfigurationError: a beta by which a moment in bfloat16 would stand still.
    """

    elementwise: ClassVar[bool] = True
    """The update of an element depends on its own history and gradient alone."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check_betas(group["betas"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _update(parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if not state:
        state["step"] = torch.zeros(())
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
    state["step"] += 1
    step, gradient = float(state["step"]), gradient.to(wide)
    # .to: what torch loads from a checkpoint has the parameter's type
    mean = state["exp_avg"].to(wide, copy=True).lerp_(gradient, 1 - beta1)
    square = state["exp_avg_sq"].to(wide, copy=True).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    state["exp_avg"], state["exp_avg_sq"] = mean.bfloat16(), square.bfloat16()
    denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    new = parameter.to(wide, copy=True).mul_(1 - group["lr"] * group["weight_decay"])
    parameter.copy_(new.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step)))


def _check_betas(betas: tuple[float, float]) -> None:
    if not all(0 <= beta <= _LARGEST_BETA for beta in betas):
        raise ConfigurationError(
            f"betas={tuple(betas)} and moments in bfloat16 do not go together: above {_LARGEST_BETA} what a step adds "
            "is lost in rounding, and a moment would stand still; use smaller betas, or moments in float32"
        )
