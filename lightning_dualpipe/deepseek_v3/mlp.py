"""The gated feed-forward network: ``down(silu(gate x) * up x)``."""

from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.recompute import kept_in_fp8, rebuilt
from lightning_dualpipe.deepseek_v3.swiglu import swiglu
from lightning_dualpipe.precision.weight_gradients import autocast_to

__all__ = ["MLP"]


class MLP(nn.Module):
    """Feed-forward network of a dense layer; also the shared experts, which together are one wide one."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = rebuilt(autocast_to, x)  # one copy for both
        gate, up = kept_in_fp8(self.gate_proj(x)), kept_in_fp8(self.up_proj(x))
        return self.down_proj(rebuilt(swiglu, gate, up))
