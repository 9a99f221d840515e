"""Choosing tokens, and choosing them as if no draft had been made (arXiv:2211.17192, arXiv:2302.01318).

A draft d was drawn from q; the model's own distribution at its place is p:

    accept d with probability min(1, p(d) / q(d))
    otherwise draw from max(p - q, 0), normalised, and drop the drafts behind it
    after the last draft, if all were accepted, draw from p

Then what is chosen is distributed as p, whatever q is. Temperature 0 is the limit in which p and q are 1 at one
token: a draft is accepted exactly if it is the model's own choice.

Shapes: B sequences, K drafts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampler"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Of the tokens sorted by probability, ``top_k`` keeps so many, then ``top_p`` the first that reach this sum."""

    temperature: float
    top_p: float
    top_k: int | None
    generator: torch.Generator

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] -> [..., V], in at least float32.

        Raises:
            FloatingPointError: a logit is not a number, or the largest is infinite.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best = logits.amax(-1, keepdim=True)
        if not best.isfinite().all():
            raise FloatingPointError("the model's logits are not finite: its weights are broken, or overflow its dtype")
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = (logits - best) / self.temperature  # so that a low temperature makes -inf of all but the best
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            worst_kept = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < worst_kept, float("-inf"))
        if self.top_p < 1:
            logits = self._nucleus(logits)
        return logits.softmax(-1)

    def choose(self, probabilities: Tensor) -> Tensor:
        """[..., V] -> tokens [...]"""
        if self.temperature == 0:
            return probabilities.argmax(-1)
        rows = probabilities.flatten(0, -2)
        return torch.multinomial(rows, 1, generator=self.generator).view(probabilities.shape[:-1])

    def verify(self, drafts_BK: Tensor, q_BKV: Tensor, p_BJV: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts of each sequence are accepted [B], and the token that follows these [B].

        ``p`` has J = K + 1 places: those of the drafts, and the one behind them.
        """
        num_drafts = drafts_BK.shape[1]
        index_BK1 = drafts_BK.unsqueeze(-1)
        ratio_BK = (p_BJV[:, :num_drafts].gather(-1, index_BK1) / q_BKV.gather(-1, index_BK1)).squeeze(-1)
        drawn_BK = torch.rand(ratio_BK.shape, dtype=ratio_BK.dtype, device=ratio_BK.device, generator=self.generator)
        accepted_B = (drawn_BK < ratio_BK).long().cumprod(-1).sum(-1)

        place_B11 = accepted_B[:, None, None].expand(-1, 1, p_BJV.shape[-1])
        p_BV = p_BJV.gather(1, place_B11).squeeze(1)
        nothing_B1V = torch.zeros_like(p_BJV[:, :1])  # the place behind the drafts: nothing was drawn there
        q_BV = torch.cat((q_BKV, nothing_B1V), dim=1).gather(1, place_B11).squeeze(1)
        rest_BV = (p_BV - q_BV).clamp(min=0)
        # nothing is left only where rounding alone refused a draft
        rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
        return accepted_B, self.choose(rest_BV)

    def _nucleus(self, logits: Tensor) -> Tensor:
        probabilities, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= self.top_p)
        return logits.masked_fill(dropped, float("-inf"))
