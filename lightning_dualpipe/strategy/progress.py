"""Whether this rank is at work: what it would be wrong to end, however long it takes.

A rank that compiles, reads data or validates uses a processor, itself or by its children, or moves bytes; one that
writes a checkpoint says so. One that waits for a peer does not: gloo sleeps. On a GPU the host may spin while it waits,
so there nothing of that counts while the device has not done what was in its queue some time ago: it waits itself, for
another rank.
"""

import ctypes
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from lightning_dualpipe.checkpoint.writing import is_writing

__all__ = ["Neighbours", "Progress", "is_stopped", "start_of", "stat_of"]

_BUSY = 0.02  # of a processor; threads that only look now and then use less
_MOVED = 64 * 2**10  # bytes between two looks
_CAPTURE_MODE_RELAXED = 2  # cuda.h


class Progress:
    """Asked now and then, of one process, on one thread.

    Args:
        device: what the rank computes on.
        overhead: bytes between two calls that this process moves for those who ask.
    """

    def __init__(self, device: torch.device, *, overhead: int = 0) -> None:
        self.others: Collection[int] = ()
        """Processes that are ranks themselves: the main process of a node is the parent of the others."""
        self._device, self._overhead = device, overhead
        self._probe: torch.cuda.Event | None = None
        self._may_ask = device.type != "cuda"
        self._when, self._used = time.monotonic(), dict[int, tuple[float, int]]()

    def made(self) -> bool:
        """Since the last call."""
        queue_moves = self._queue_moves()
        now, used = time.monotonic(), self._used_by_each()
        busy = sum(_grown(self._used, used, 0)) > _BUSY * (now - self._when)
        moved = sum(_grown(self._used, used, 1)) > _MOVED + self._overhead
        self._when, self._used = now, used
        return queue_moves and (busy or moved or is_writing())

    def _queue_moves(self) -> bool:
        """Whether the device has done what was in its queue at an earlier call."""
        if self._device.type != "cuda":
            return True
        if not self._may_ask:
            _allow_questions_during_a_capture()
            self._may_ask = True
        try:
            done = self._probe is None or self._probe.query()
            if done:
                self._probe = torch.cuda.Event()
                self._probe.record(torch.cuda.default_stream(self._device))
        except RuntimeError:  # the device cannot be asked now; whoever uses it will hear of it, if it is broken
            self._probe = None
            return True
        return done

    def _used_by_each(self) -> dict[int, tuple[float, int]]:
        """Seconds of processors and bytes, by this process and by those it has started, except other ranks."""
        mine = os.getpid()
        used = {child: (_seconds_of(child), _bytes_of(child)) for child in _descendants(mine, self.others)}
        return {mine: (time.process_time(), _bytes_of(mine)), **used}


class Neighbours:
    """Ranks of this host that use a processor, asked from outside: one in a single long call that holds Python's lock
    cannot say so itself."""

    def __init__(self) -> None:
        self._when, self._seconds = time.monotonic(), dict[int, float]()

    def busy(self, processes: Collection[int]) -> set[int]:
        """Since the last call."""
        now, seconds = time.monotonic(), {process: _seconds_of(process) for process in processes}
        least = _BUSY * (now - self._when)
        found = {each for each in processes if seconds[each] - self._seconds.get(each, seconds[each]) > least}
        self._when, self._seconds = now, seconds
        return found


def _allow_questions_during_a_capture() -> None:
    """By this thread, of a CUDA graph by another one, which they would otherwise break."""
    with suppress(OSError, AttributeError):
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def _grown(before: Mapping[int, tuple[float, int]], now: Mapping[int, tuple[float, int]], which: int) -> list[float]:
    """By process: the sum of all would fall when one ends."""
    return [max(0, used[which] - before.get(process, (0.0, 0))[which]) for process, used in now.items()]


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


def stat_of(task: Path) -> list[str]:
    """The fields of ``stat`` in /proc, of a process or a thread, from the third on; none if it has ended.

    A name in brackets comes before: it may have spaces, and the kernel cuts it, maybe within a character.
    """
    try:
        return (task / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _stat(process: int) -> list[str]:
    return stat_of(Path(f"/proc/{process}"))


def _bytes_of(process: int) -> int:
    """Read and written, whether or not it came to a disk; and by a disk, which is all that is seen of mapped files."""
    with suppress(OSError):
        counts = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
        return sum(int(counts[each]) for each in ("rchar", "wchar", "read_bytes", "write_bytes"))
    return 0
