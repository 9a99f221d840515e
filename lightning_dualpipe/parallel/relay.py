"""Journeys of more than one hop, started one after another on one rank: somebody has to start the second hop.

On a GPU nobody does: waiting for the first hop is queued on the communication stream like anything else,
so all hops are launched at once. gloo makes whoever waits wait, so there each journey has a thread, which
waits for the one before to have launched its last hop: collectives meet in the order in which journeys
were started, as on a stream. The last landing is left to whoever wants what arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

import torch

__all__ = ["Relay"]

T = TypeVar("T")


class Relay:
    """One for all journeys of a rank through the same groups."""

    def __init__(self) -> None:
        self._last: Future[Any] | None = None

    def start(self, journey: Callable[[], T]) -> Future[T]:
        """Run ``journey`` after those that were started before; what it raises, its result raises."""
        before = self._last
        if before is not None and before.done() and before.exception() is not None:
            before = None  # it was told to whoever waited for it
        self._last = done = Future[T]()
        Thread(target=_run, args=(journey, before, done), name="relay", daemon=True).start()
        return done


@torch.no_grad()
def _run(journey: Callable[[], T], before: Future[Any] | None, done: Future[T]) -> None:
    try:
        if before is not None and (failed := before.exception()) is not None:
            raise failed
        done.set_result(journey())
    except BaseException as error:
        done.set_exception(error)
