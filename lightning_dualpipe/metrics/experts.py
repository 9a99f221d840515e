"""How evenly tokens are spread over the experts of a layer (arXiv:2408.15664, section 4.1).

    MaxVio = (largest load - mean load) / mean load          0: even;  E / K - 1: all choose the same K

``MaxVio_batch`` is that of one optimizer step, ``MaxVio_global`` that of many batches together, for
instance a validation set: sum the counts first.

Shapes: E experts; any leading dimensions are layers.
"""

import torch
from torch import Tensor

__all__ = ["dead_experts", "max_violation"]


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio of counts [..., E] -> [...], float64; 0 where nothing was counted. Waits for no device."""
    counts_E = counts_E.to(torch.float64)
    mean = counts_E.mean(-1)
    return (counts_E.amax(-1) / mean.where(mean > 0, 1.0) - 1.0).where(mean > 0, 0.0)


def dead_experts(counts_E: Tensor) -> Tensor:
    """How many experts no token chose, counts [..., E] -> int64 [...]; 0 where nothing was counted."""
    return ((counts_E == 0) & (counts_E.sum(-1, keepdim=True) > 0)).sum(-1)
