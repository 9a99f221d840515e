"""What a processor and its links can do. Every number has its source beside it.

    matmul rate = peak x achievable       the largest rate anybody measured for one matrix product alone
    network     = line rate x 0.89        what DeepEP's kernels reach, per processor and direction

A whole training step is slower than its matrix products alone; by how much is ``estimate``'s, once for
all hardware, from DeepSeek's published trace.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["HARDWARE", "Hardware", "Precision", "hardware_named"]

Precision = Literal["fp8", "bf16"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """One processor in its node. FLOP/s are dense; bytes are of 1e9 a GB; links are per processor, one direction."""

    name: str
    bf16_peak: float
    fp8_peak: float | None  # None: no FP8 matrix units
    bf16_achievable: float  # share of the peak
    fp8_achievable: float
    memory: float
    memory_bandwidth: float
    nvlink: float  # achieved, between processors of one node
    network: float  # achieved, between nodes
    per_node: int
    seconds_per_row: float  # of an all-to-all: what a token costs for each processor it goes to, besides its bytes

    def matmul_rate(self, precision: Precision) -> float:
        """FLOP/s of a matrix product that has the processor to itself."""
        if precision == "bf16":
            return self.bf16_peak * self.bf16_achievable
        assert self.fp8_peak is not None, f"{self.name} has no FP8; plan refuses it"
        return self.fp8_peak * self.fp8_achievable


# Peaks, memory: NVIDIA's data sheets of A100, H100, H200 and HGX B200 (dense rates: half of those with sparsity). The
# H800 is an H100 with NVLink cut from 900 to 400 GB/s, both directions together, so 200 each way, of which about 160
# can be achieved (arXiv:2505.09343, section 4.3; 160 is what arXiv:2412.19437, section 3.2.2, counts with).
_HOPPER_BF16, _HOPPER_FP8 = 989.4e12, 1978.9e12
# 792.1 of 989 TFLOP/s on H100, 267.9 of 312 on A100: the largest matrix product of Stas Bekman's "ML Engineering",
# compute/accelerator, table "Maximum Achievable Matmul FLOPS".
_H100_BF16, _A100_BF16 = 792.1 / 989, 267.9 / 312
# 1550 TFLOP/s on H800: DeepGEMM, README, news of 2025-04-18.
_H800_FP8 = 1550 / 1978.9
# DeepEP V1, README (docs/legacy.md): 153 GB/s of the H800's 200 over NVLink; 51 GB/s over InfiniBand of 50 GB/s, at
# EP64, where tokens for the node they are on are counted too: 7/8 of it crosses the network.
_NVLINK_SHARE, _NETWORK_SHARE = 153 / 200, 51 * 7 / 8 / 50
# Per row and collective: DeepSeek's trace on H800 (profile.DEEPSEEK) less the bytes at the rates above. Its FP8 and its
# BF16 all-to-alls give 137 and 132 ns (tests/planner/test_calibration.py).
_ROW = 135e-9


def _gpu(
    name: str, *, bf16: float, fp8: float | None, achievable: float, memory: float, hbm: float, nvlink: float, ib: float
) -> Hardware:
    """``nvlink`` and ``ib`` are line rates in GB/s, one direction; memory in GB, ``hbm`` in TB/s."""
    return Hardware(
        name=name,
        bf16_peak=bf16,
        fp8_peak=fp8,
        bf16_achievable=achievable,
        fp8_achievable=_H800_FP8,
        memory=memory * 1e9,
        memory_bandwidth=hbm * 1e12,
        nvlink=nvlink * 1e9 * _NVLINK_SHARE,
        network=ib * 1e9 * _NETWORK_SHARE,
        per_node=8,
        seconds_per_row=_ROW,
    )


_HOPPER = {"bf16": _HOPPER_BF16, "fp8": _HOPPER_FP8, "achievable": _H100_BF16}
HARDWARE: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("h800", **_HOPPER, memory=80, hbm=3.35, nvlink=200, ib=50),
        _gpu("h100", **_HOPPER, memory=80, hbm=3.35, nvlink=450, ib=50),
        _gpu("h200", **_HOPPER, memory=141, hbm=4.8, nvlink=450, ib=50),
        # Nobody's largest product on B200 is at hand: Hopper's shares are taken over, which is an assumption.
        _gpu("b200", bf16=2250e12, fp8=4500e12, achievable=_H100_BF16, memory=180, hbm=7.7, nvlink=900, ib=50),
        # 200 Gbit/s a GPU, as in DGX A100 and DeepSeek's own A100 cluster.
        _gpu("a100", bf16=312e12, fp8=None, achievable=_A100_BF16, memory=80, hbm=2.04, nvlink=300, ib=25),
        # One core of the development machine, an AMD EPYC (Zen 3): 16 fp32 multiply-adds a cycle at 2.45 GHz, which
        # bf16 is computed with; its share of memory and of a 10 Gbit/s network. For trying the planner at home.
        Hardware("cpu", 78e9, None, 0.7, 0.7, 12e9, 10e9, 2e9, 1.25e9, 2, 0.0),
    )
}


def hardware_named(name: str) -> Hardware:
    """Raises ConfigurationError for a name that is none of ``HARDWARE``."""
    if name.lower() not in HARDWARE:
        near = get_close_matches(name.lower(), HARDWARE, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"gpu={name!r} is none of {', '.join(HARDWARE)}{hint}")
    return HARDWARE[name.lower()]
