"""Measures of a run, as functions and small values: how even the experts' load is, how fast tokens pass,
how much memory was held."""

from lightning_dualpipe.metrics.experts import dead_experts, max_violation
from lightning_dualpipe.metrics.memory import peak_memory
from lightning_dualpipe.metrics.throughput import CountsFlops, TokenRate, flops_utilization, num_tokens

__all__ = [
    "CountsFlops",
    "TokenRate",
    "dead_experts",
    "flops_utilization",
    "max_violation",
    "num_tokens",
    "peak_memory",
]
