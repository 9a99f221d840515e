"""The routed experts: gated feed-forward networks whose weights are stacked into two tensors.

Tokens arrive sorted by expert, so that each of the two matrix multiplications is one grouped call.
An expert's output is scaled by the token's weight before ``down``, which is narrower than after it.

Shapes: R rows, E experts held here, D hidden, I width of an expert, J = 2 I (gate, then up).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.recompute import kept_in_fp8, rebuilt
from lightning_dualpipe.deepseek_v3.swiglu import weighted_swiglu
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.grouped_linear import grouped_linear
from lightning_dualpipe.precision.matmul import GroupedMatmul

__all__ = ["Experts"]


class Experts(nn.Module):
    """Row i of the weights belongs to expert ``first_expert + i`` of the layer."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.first_expert = 0
        self.weight_gradients: WeightGradients | None = None
        self.grouped_matmuls: dict[str, GroupedMatmul] = dict.fromkeys(("gate_up_proj", "down_proj"), grouped_linear)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, intermediate))

    @property
    def num_experts(self) -> int:
        """How many are held here."""
        return len(self.gate_up_proj)

    def forward(self, x_RD: Tensor, weights_R: Tensor, counts_E: Tensor) -> Tensor:
        """``y_RD``, each row the output of its expert times its weight; the first ``counts_E[0]`` rows are row 0's."""
        gate_up, down = self.grouped_matmuls["gate_up_proj"], self.grouped_matmuls["down_proj"]
        gate_up_RJ = kept_in_fp8(gate_up(x_RD, self.gate_up_proj, counts_E, self.weight_gradients))
        y_RI = rebuilt(weighted_swiglu, gate_up_RJ, weights_R)
        return down(y_RI, self.down_proj, counts_E, self.weight_gradients)

    def keep_experts(self, first: int, count: int) -> None:
        """Hold only experts ``first .. first + count - 1``, in new parameters. Before an optimizer is made."""
        start = first - self.first_expert
        assert 0 <= start <= self.num_experts - count, (
            f"experts {first}..{first + count - 1} are not all among "
            f"{self.first_expert}..{self.first_expert + self.num_experts - 1}, the ones held here"
        )
        if count == self.num_experts:
            return
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(self, name)
            rows = whole.detach()[start : start + count].clone()  # a view would keep the others' memory
            setattr(self, name, nn.Parameter(rows, requires_grad=whole.requires_grad))
        self.first_expert = first

    def extra_repr(self) -> str:
        num_experts, hidden, intermediate = self.down_proj.shape
        last = self.first_expert + num_experts - 1
        return f"{self.first_expert}..{last}, hidden={hidden}, intermediate={intermediate}"
