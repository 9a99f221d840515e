"""Signals, where Python or Lightning alone would leave the run hanging.

A Python signal handler runs between two instructions of the main thread. While that thread waits in
C++ for another rank, Ctrl+C does nothing: ``UnheardSignal`` tells another thread of it. And what
Lightning's own handler does on SIGTERM, a broadcast in the middle of whatever the rank was doing,
crosses the collectives of ranks that have not got the signal yet: ``stop_between_batches`` leaves it out.
"""

import os
import signal
import socket
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dualpipe.between_batches import BetweenBatches
from lightning_dualpipe.strategy.failures import LocalRun

__all__ = ["UnheardSignal", "exit_as_terminated", "saves_between_batches", "stop_between_batches"]

_running: "weakref.ref[Trainer] | None" = None  # whose batches it is that signals wait for


class UnheardSignal:
    """Notices a signal that the main thread does not get to handle. Made on the main thread."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs  # kept open
        self._since: tuple[float, Any] | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        if previous != -1:  # somebody else, such as asyncio, listens already
            signal.set_wakeup_fd(previous)
        else:
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def wait(self, seconds: float) -> None:
        """For the next signal, at most this long."""
        self._ours.settimeout(seconds)
        try:
            arrived = self._ours.recv(64)
        except TimeoutError:
            return
        if {signal.SIGINT, signal.SIGTERM} & set(arrived) and self._since is None:
            self._since = (time.monotonic(), _position())

    def seconds(self) -> float:
        """How long the main thread has not moved since a signal to end."""
        if self._since is None:
            return 0.0
        since, position = self._since
        if position != _position():  # its handler has run
            self._since = None
            return 0.0
        return time.monotonic() - since


def _position() -> tuple[int, int]:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return id(frame), frame.f_lasti if frame is not None else 0


def stop_between_batches(trainer: Trainer) -> None:
    """SIGTERM, to whichever rank, leaves a note with all ranks of the node: Lightning stops after the batch."""
    global _running
    _running = weakref.ref(trainer)
    connector, run = trainer._signal_connector, LocalRun.joined()

    def note(number: int, frame: FrameType | None) -> None:
        if connector.received_sigterm:
            return
        connector.received_sigterm = True
        if run is not None and run.main != os.getpid():
            os.kill(run.main, number)
        elif isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            launcher.kill(number)

    connector._sigterm_notifier_fn = note  # type: ignore[method-assign,assignment]


def saves_between_batches(trainer: Trainer | None = None) -> bool:
    """Whether a signal lets a callback save after the batch, which is then worth a wait.

    Args:
        trainer: None is the one whose batches are stopped.
    """
    trainer = trainer or (_running() if _running is not None else None)
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(each, BetweenBatches) for each in callbacks)


def exit_as_terminated(exception: BaseException) -> None:
    """A run that SIGTERM has stopped ends with the code a shell gives it; Lightning's 0 would pass for success."""
    if isinstance(exception, SIGTERMException) and exception.code is None:
        exception.code = 128 + signal.SIGTERM
