"""Whether this rank is at work: what it would be wrong to end, however long it takes.

A rank that compiles, reads data, validates or writes a checkpoint uses a processor, itself or by its children, or moves
bytes. One that waits for a peer does not: gloo sleeps. On a GPU the host may spin while it waits, so there nothing of
that counts while the device has not done what was in its queue some time ago: it waits itself, for another rank.
"""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["Progress", "is_stopped", "start_of"]

_BUSY = 0.02  # of a processor; threads that only look now and then use less
_MOVED = 64 * 2**10  # bytes between two looks


class Progress:
    """Asked now and then, of one process.

    Args:
        device: what the rank computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.others: Collection[int] = ()
        """Processes that are ranks themselves: the main process of a node is the parent of the others."""
        self._device = device
        self._probe: torch.cuda.Event | None = None
        self._last = (time.monotonic(), 0.0, 0)

    def made(self) -> bool:
        """Since the last call."""
        queue_moves = self._queue_moves()
        before, now = self._last, (time.monotonic(), self._seconds(), _bytes_moved())
        self._last = now
        busy = now[1] - before[1] > _BUSY * (now[0] - before[0])
        return queue_moves and (busy or now[2] - before[2] > _MOVED)

    def _queue_moves(self) -> bool:
        """Whether the device has done what was in its queue at an earlier call."""
        if self._device.type != "cuda":
            return True
        done = self._probe is None or self._probe.query()
        if done:
            self._probe = torch.cuda.Event()
            self._probe.record(torch.cuda.default_stream(self._device))
        return done

    def _seconds(self) -> float:
        """Of processors, by this process and by those it has started, except other ranks."""
        return time.process_time() + sum(_seconds_of(child) for child in _descendants(os.getpid(), self.others))


def start_of(process: int) -> str:
    """When a process was started, which tells it from a later one with its number; "" if there is none."""
    fields = _stat(process)
    return fields[19] if fields else ""


def is_stopped(process: int) -> bool:
    """By a signal, or by a debugger."""
    return _stat(process)[:1] in (["T"], ["t"])


def _descendants(process: int, without: Collection[int]) -> Iterator[int]:
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                if child not in without:
                    yield child
                    yield from _descendants(child, without)


def _seconds_of(process: int) -> float:
    fields = _stat(process)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _stat(process: int) -> list[str]:
    """The fields of /proc/…/stat from the third on: a name in brackets comes before, and may have spaces."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _bytes_moved() -> int:
    """Read and written by this process, whether or not it came to a disk."""
    with suppress(OSError):
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counts["rchar"]) + int(counts["wchar"])
    return 0
