"""All-to-all of rows with uneven counts, differentiable; every rank takes part in its backward too.

Autograd leaves out what it believes nobody needs: the backward of a rank whose input requires no
gradient, for instance because it has not a single token. If one rank leaves out a collective, the
others wait for ever. So ranks tell each other beforehand which gradients they want, and all of them
run the backward of everything that anybody wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Crossing", "agree", "cross"]


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """How many rows go to and come from each rank of the group."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    def back(self) -> Crossing:
        return Crossing(self.group, sent=self.received, received=self.sent)

    def launch(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Start the all-to-all; the result may be read after ``wait``."""
        out = x.new_empty(sum(self.received), *x.shape[1:])
        work = dist.all_to_all_single(out, x.contiguous(), self.received, self.sent, group=self.group, async_op=True)
        return out, work


def agree(
    counts_SE: Tensor, group: dist.ProcessGroup, wants: tuple[bool, ...]
) -> tuple[Tensor, Crossing, tuple[bool, ...]]:
    """Tell rank s of the group that ``counts_SE[s]`` rows are coming, by its experts, and which gradients we want.

    Returns the counts that the others tell us, in the same form; the crossing; and for each of
    ``wants`` whether any rank does. Waits once for the device: buffers need their sizes.
    """
    flags_SF = torch.stack([torch.full_like(counts_SE[:, 0], int(want)) for want in wants], dim=1)
    telling = torch.cat([counts_SE, flags_SF], dim=1)
    told = torch.empty_like(telling)
    dist.all_to_all_single(told, telling, group=group)
    num_experts = counts_SE.shape[1]
    sent, received = torch.stack([telling, told]).tolist()
    crossing = Crossing(
        group,
        sent=[sum(row[:num_experts]) for row in sent],
        received=[sum(row[:num_experts]) for row in received],
    )
    return told[:, :num_experts], crossing, tuple(any(flags) for flags in zip(*received, strict=True))[num_experts:]


def cross(crossing: Crossing, wanted: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Send the rows of each tensor. Gradients travel back where ``wanted``, which must be equal on all ranks."""
    # requires a gradient whenever any rank wants one, so that autograd does not leave out this rank
    anchor = torch.empty(0, requires_grad=any(wanted))
    crossed: tuple[Tensor, ...] = _Cross.apply(crossing, wanted, anchor, *tensors)
    return crossed


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, crossing: Crossing, wanted: tuple[bool, ...], anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.crossing, ctx.wanted = crossing, wanted
        crossed = _exchange(crossing, *tensors)
        ctx.mark_non_differentiable(*(out for out, want in zip(crossed, wanted, strict=True) if not want))
        return crossed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [grad for grad, want in zip(grads, ctx.wanted, strict=True) if want]
        returned = iter(_exchange(ctx.crossing.back(), *wanted))
        return None, None, None, *(next(returned) if want else None for want in ctx.wanted)


def _exchange(crossing: Crossing, *tensors: Tensor) -> tuple[Tensor, ...]:
    launched = [crossing.launch(tensor) for tensor in tensors]
    for _, work in launched:
        work.wait()
    return tuple(out for out, _ in launched)
