"""Whether this process writes a checkpoint, for those who watch if it is at work.

A write may wait for a disk for minutes while nothing can be seen to move: what one ``fsync`` has to bring there was
counted as written when it came into memory. Around what a rank does alone, not around what it does with others.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_writing", "writing"]

_lock = threading.Lock()
_writers = 0


@contextmanager
def writing() -> Iterator[None]:
    """On whichever thread."""
    global _writers
    with _lock:
        _writers += 1
    try:
        yield
    finally:
        with _lock:
            _writers -= 1


def is_writing() -> bool:
    return _writers > 0
