"""The end of a rank's process, before which gloo's threads must have let go of the last tensors.

    main thread                              a thread of gloo
    takes the result of the last collective  has still to let go of its tensors
    runs to its end                          waits for Python's lock: a tensor is a Python object
    Python shuts down                        never gets it: pthread_exit unwinds a destructor, which C++ forbids,
                                             so the process ends by SIGABRT, and a run that went well has failed

torch expects its caller to use ``destroy_process_group`` (pytorch/pytorch#190489), and even that ends the threads only
when nothing refers to a group any more, as the Trainer of a script does.

Collectives that nobody has waited for are not covered: their threads rest too, until a peer comes.
"""

import atexit
import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from lightning_dualpipe.strategy.progress import stat_of

__all__ = ["wait_for_threads_at_exit"]

_PATIENCE_SECONDS = 2.0  # a thread of somebody else may compute for ever
_POLL_SECONDS = 0.002
_LOOKS = 2  # a thread that waits for the lock of this one looks idle; it gets it while this one sleeps


@cache  # once in a process
def wait_for_threads_at_exit() -> None:
    """Let other threads come to rest before Python shuts down: 5 to 12 ms, and 2 s if one of them never does.

    To be called early: what is registered for the exit first is done last.
    """
    atexit.register(_come_to_rest)


def _come_to_rest() -> None:
    quiet, end = 0, time.monotonic() + _PATIENCE_SECONDS
    with suppress(KeyboardInterrupt):
        while quiet < _LOOKS and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)  # without the lock
            quiet = 0 if _others_run() else quiet + 1


def _others_run() -> bool:
    """Whether another thread of this process runs or could; False where the system does not tell."""
    with suppress(OSError):
        mine = Path(os.readlink("/proc/thread-self")).name  # get_native_id is that of another namespace, maybe
        for task in Path("/proc/self/task").iterdir():
            if stat_of(task)[:1] in (["R"], ["D"]) and task.name != mine:
                return True
    return False
