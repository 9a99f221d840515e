"""A phase that keeps its inputs only, and computes the rest again when its backward asks for it."""

from contextlib import nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from lightning_dualpipe.interface import Batch, Phase, Values, recomputing

__all__ = ["run_phase"]


def run_phase(phase: Phase, values: Values, batch: Batch) -> Values:
    """``phase(values, batch)``, honouring ``phase.recompute``. Random numbers are the same the second time."""
    if not (phase.recompute and torch.is_grad_enabled()):
        return phase(values, batch)
    again = nullcontext(), recomputing()
    own = checkpoint(phase.work, phase.own(values), batch, use_reentrant=False, context_fn=lambda: again)
    return phase.replaced(values, own)
