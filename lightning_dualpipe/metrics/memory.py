"""The most memory that a process has held."""

import resource
import sys
from pathlib import Path

import torch

__all__ = ["peak_memory"]

_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch had allocated on a GPU, else the resident memory of this process. Waits for no device.

    On a GPU the allocator may have reserved more, and libraries such as NCCL hold memory of their own.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage also counts what the process was before exec: a worker would have the peak of who started it
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
