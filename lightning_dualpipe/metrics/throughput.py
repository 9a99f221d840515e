"""Tokens per second, and the share of the hardware's arithmetic that they use (MFU).

    MFU = tokens per second x FLOPs per token / (devices x peak FLOP/s of one)

A token counts once, wherever in a pipeline it passes: all ranks of a pipeline work on the same batch.
"""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor

from lightning_dualpipe.planner.hardware import HARDWARE

__all__ = ["CountsFlops", "TokenRate", "flops_utilization", "num_tokens", "peak_flops"]


@runtime_checkable
class CountsFlops(Protocol):
    """A LightningModule that knows the arithmetic of its training."""

    def training_flops(self, sequence_length: int) -> float:
        """FLOPs of forward and backward per token."""
        ...


class TokenRate:
    """A stop-watch for tokens. Time in a pause does not count.

    Args:
        clock: seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._tokens = 0
        self._seconds = 0.0
        self._running_since: float | None = None

    def run(self) -> None:
        """Begin, or go on after a pause."""
        if self._running_since is None:
            self._running_since = self._clock()

    def pause(self) -> None:
        if self._running_since is not None:
            self._seconds += self._clock() - self._running_since
            self._running_since = None

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def lap(self) -> tuple[int, float]:
        """Tokens and seconds since the last lap."""
        running = self._running_since is not None
        self.pause()
        lap = self._tokens, self._seconds
        self._tokens, self._seconds = 0, 0.0
        if running:
            self.run()
        return lap


def num_tokens(batch: Any) -> int:
    """Positions of ``batch["input_ids"]``, padding included; 0 for batches of another kind. Waits for no device."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return tokens.numel() if isinstance(tokens, Tensor) else 0


def flops_utilization(flops_per_second: float, *, device: torch.device, dtype: torch.dtype) -> float | None:
    """Share of the device's peak at ``dtype``; None where the peak is not known, as of any CPU."""
    peak = peak_flops(device, dtype)
    return flops_per_second / peak if peak else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s by the data sheet; None where nobody knows."""
    if device.type != "cuda":
        return None
    known = _bf16_peak(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None
    return known or get_available_flops(device, dtype)


def _bf16_peak(name: str) -> float | None:
    """By the planner's table, of SXM modules. Lightning does not know an "NVIDIA H200", and counts sparsity there."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    found = [HARDWARE[word].bf16_peak for word in words if word in HARDWARE and word != "cpu"]
    return found[0] if found and not {"pcie", "nvl"} & set(words) else None
