"""Which experts see a token, and how their load stays even (technical report, section 2.1.2).

    s = sigmoid(W x)                                    affinity, eq. 15
    choose the K largest s + b, within the best groups  b is for choosing only, eq. 16
    weight of a chosen expert = s / sum of chosen s     eq. 13, times ``routed_scaling_factor``

    b_i += gamma * sign(mean load - load_i)             once per optimizer step, no gradient
    L   = alpha sum_i f_i P_i                           per sequence, against extremes, eq. 17-20

Experts lie in ``n_group`` groups, by which they are placed on nodes; a token's experts come from the
``topk_group`` groups whose two best s + b have the largest sum. Affinities are computed in at least
float32, and b stays float32 in every precision: steps of gamma would vanish in half types.

Whoever steps the optimizer sums ``tokens_per_expert`` over all ranks that hold the layer and calls
``update_bias``.

Shapes: B sequences, T positions, N = B T tokens, D hidden, E experts, K chosen, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.recompute import rebuilt
from lightning_dualpipe.interface import is_recomputing
from lightning_dualpipe.precision.weight_gradients import without_autocast

__all__ = ["Router"]

_BEST_OF_GROUP = 2  # a group is judged by so many of its experts


class Router(nn.Module):
    """``tokens_per_expert`` [E] int64: choices since the last ``update_bias``, once for each training forward."""

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.num_groups = config.n_group
        self.top_groups = config.topk_group
        self.normalizes = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.alpha = config.aux_loss_alpha
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        # no buffer: DDP would overwrite it with another rank's between the batches of an accumulated step
        self.tokens_per_expert = torch.zeros(config.n_routed_experts, dtype=torch.int64, device="cpu")

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(weights_NK, experts_NK, balance_B)``; the balance loss as ``balance_loss`` scales it.

        Padding, where ``real_BT`` is 0, is routed as any token is, but neither counted nor balanced.
        """
        if real_BT is None:
            real_BT = x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.int64)
        scores_BTE = self._scores(x_BTD)
        scores_NE = scores_BTE.flatten(0, 1)
        experts_NK = self._choose(scores_NE.detach())
        self._count(experts_NK, real_BT)

        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.normalizes:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        balance_B = balance_loss(scores_BTE, real_BT, top_k=self.top_k, alpha=self.alpha)
        return weights_NK * self.scaling, experts_NK, balance_B

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor, gamma: float) -> None:
        """Move the bias against the load ``counts_E`` (summed over ranks), and count from zero again."""
        excess_E = counts_E * self.num_experts - counts_E.sum()  # integers: exactly 0 where the load is the mean
        self.e_score_correction_bias -= gamma * excess_E.sign().to(self.e_score_correction_bias)
        self.tokens_per_expert.zero_()

    def _scores(self, x_BTD: Tensor) -> Tensor:
        with without_autocast(x_BTD):
            return F.linear(rebuilt(_widened, x_BTD), rebuilt(_widened, self.weight)).sigmoid()

    def _choose(self, scores_NE: Tensor) -> Tensor:
        biased_NE = scores_NE + self.e_score_correction_bias
        if self.top_groups < self.num_groups:
            biased_NE = self._within_best_groups(biased_NE)
        return biased_NE.topk(self.top_k).indices

    def _within_best_groups(self, biased_NE: Tensor) -> Tensor:
        """-inf for experts of other groups: 0 could win over negative scores."""
        biased_NGE = biased_NE.unflatten(-1, (self.num_groups, -1))
        strength_NG = biased_NGE.topk(_BEST_OF_GROUP).values.sum(-1)
        others_NG = torch.ones_like(strength_NG, dtype=torch.bool)
        others_NG.scatter_(-1, strength_NG.topk(self.top_groups).indices, False)
        return biased_NGE.masked_fill(others_NG.unsqueeze(-1), float("-inf")).flatten(-2)

    def _count(self, experts_NK: Tensor, real_BT: Tensor) -> None:
        if self.training and torch.is_grad_enabled() and not is_recomputing():
            choices = experts_NK.flatten()
            self.tokens_per_expert = self.tokens_per_expert.to(choices.device)  # parameters may be moved one by one
            counted_NK = real_BT.to(choices).reshape(-1, 1).expand_as(experts_NK)
            self.tokens_per_expert.scatter_add_(0, choices, counted_NK.flatten())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts do not reach the bias; moves do."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = moved.float() if before.is_meta else before.to(moved.device)
        if not moved.is_meta:
            self.tokens_per_expert = self.tokens_per_expert.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.top_k} of {self.num_experts}, {self.top_groups} of {self.num_groups} groups"


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def balance_loss(scores_BTE: Tensor, real_BT: Tensor, *, top_k: int, alpha: float) -> Tensor:
    """``T * alpha * sum_i f_i P_i`` per sequence (eq. 17-20) [B], where T are its tokens, those with ``real_BT`` 1.

    f_i is how often expert i is among the K best of a token by plain affinity, neither biased nor limited
    to groups, relative to an even load; P_i its mean share of the affinities. The factor T turns a sum over
    sequences, divided by the number of tokens, into the mean over sequences.
    """
    num_sequences, _, num_experts = scores_BTE.shape
    if alpha == 0:
        return scores_BTE.new_zeros(num_sequences)
    real_BT = real_BT.to(scores_BTE.dtype)
    best_BTK = scores_BTE.detach().topk(top_k).indices
    counts_BE = scores_BTE.new_zeros(num_sequences, num_experts).scatter_add_(
        1, best_BTK.flatten(1), real_BT.unsqueeze(-1).expand_as(best_BTK).flatten(1)
    )
    frequency_BE = counts_BE * num_experts / (top_k * real_BT.sum(-1, keepdim=True).clamp(min=1))
    with without_autocast(scores_BTE):
        share_B1E = torch.bmm((real_BT / (scores_BTE.sum(-1) + 1e-20)).unsqueeze(1), scores_BTE)  # T * P_i
    return alpha * (frequency_BE * share_B1E.squeeze(1)).sum(-1)
