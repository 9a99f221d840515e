"""The mixture of experts: routed experts for few tokens each, shared experts for all (section 2.1.2).

              ┌──────────────────── shared experts ───────────────────┐
    x_BTD ──► router ──► dispatch ══► experts, times weights ══► combine ──► +      ══ may cross ranks

``dispatcher`` is the only thing that knows where experts live. The parts are public, because a
decoder block runs them as phases of its own.

With a ``token_format``, tokens that go to experts, and gradients that go there in backward, are rounded to
FP8 one by one, before they are copied; what comes home is not.

Shapes: B sequences, T positions, D hidden, N = B T tokens, K experts per token.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.deepseek_v3.mlp import MLP
from lightning_dualpipe.deepseek_v3.router import Router
from lightning_dualpipe.parallel.dispatch import LocalDispatcher, TokenDispatcher
from lightning_dualpipe.precision.fp8_rows import FP8Rows

__all__ = ["MoE"]


class MoE(nn.Module):
    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.dispatcher: TokenDispatcher = LocalDispatcher(config.n_routed_experts)
        self.token_format: FP8Rows | None = None
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts: nn.Module = NoSharedExperts()
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """``(y_BTD, balance_B)``."""
        weights_NK, experts_NK, balance_B = self.gate(x_BTD)
        x_ND = self.to_experts(x_BTD.flatten(0, 1))
        x_RD, weights_R, routing = self.dispatcher.dispatch(x_ND, weights_NK, experts_NK)
        y_RD = self.experts(x_RD, weights_R, routing.counts_E)
        y_ND = self.from_experts(self.dispatcher.combine(y_RD, routing))
        return y_ND.view_as(x_BTD) + self.shared_experts(x_BTD), balance_B

    def to_experts(self, x_ND: Tensor) -> Tensor:
        """Tokens as they go into ``dispatcher``: on the grid of the format in which they travel."""
        return x_ND if self.token_format is None else self.token_format.round(x_ND)

    def from_experts(self, y_ND: Tensor) -> Tensor:
        """What comes out of it, as it is; on that grid is its gradient, which goes to experts in backward."""
        return y_ND if self.token_format is None else self.token_format.round_gradient(y_ND)

    @property
    def num_local_experts(self) -> int:
        """How many are held here; all, until they are spread."""
        return self.experts.num_experts

    def use_dispatcher(self, dispatcher: TokenDispatcher) -> None:
        """Exchange tokens through ``dispatcher`` and keep its local experts only. Before an optimizer is made."""
        self.experts.keep_experts(dispatcher.first_local_expert, dispatcher.num_local_experts)
        self.dispatcher = dispatcher
        self.use_token_format(self.token_format)

    def use_token_format(self, rows: FP8Rows | None) -> None:
        """Round what goes to experts to that grid, and let it travel so; None: leave it as it is."""
        self.token_format = self.dispatcher.row_format = rows


class NoSharedExperts(nn.Module):
    """Adds nothing."""

    def forward(self, x: Tensor) -> float:
        return 0.0
