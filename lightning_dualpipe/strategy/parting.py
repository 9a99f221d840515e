"""The end of a rank's process, before which gloo's threads must have let go of the last tensors.

    main thread                              a thread of gloo
    takes the result of the last collective  has still to let go of its tensors
    runs to its end                          waits for Python's lock: a tensor is a Python object
    Python shuts down                        gets it never: pthread_exit unwinds a destructor, which C++ forbids,
                                             so the process ends by SIGABRT, and a run that went well has failed

torch leaves that to whoever calls ``destroy_process_group`` (pytorch/pytorch#190489), and even that ends the threads
only when nothing refers to a group any more, as the Trainer of a script does.
"""

import atexit
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["part_at_exit"]

_PATIENCE_SECONDS = 2.0  # a thread of somebody else may compute for ever
_POLL_SECONDS = 0.002
_LOOKS = 2  # in the first, one that waits for the lock which this thread has looks idle; then it gets it


@cache  # once in a process
def part_at_exit() -> None:
    """Let threads that hold tensors come to rest before Python shuts down; on every rank, as early as possible."""
    atexit.register(_come_to_rest)


def _come_to_rest() -> None:
    quiet, end = 0, time.monotonic() + _PATIENCE_SECONDS
    while quiet < _LOOKS and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)  # without the lock
        quiet = 0 if _others_run() else quiet + 1


def _others_run() -> bool:
    """Whether another thread of this process runs or could; False where the system does not tell."""
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state in "RD" and int(task.name) != threading.get_native_id():
                return True
    return False
