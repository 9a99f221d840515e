"""The second stream of a GPU: messages and tokens travel on it while the first one computes.

A launch waits for what it sends and for nothing that was queued after that: ``mark`` remembers a point
of the computation, ``after`` launches from there. The host too may wait there, for counts of tokens,
while the GPU computes. On CPUs there is nothing to do: gloo has threads of its own.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch

__all__ = ["CommunicationStream", "Mark"]

Mark = torch.cuda.Event | None
"""A point of the computation; None on CPUs."""


class CommunicationStream:
    """One for all communication of a rank, so that its order is the order of launches."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def mark(self) -> Mark:
        """What has been queued for computation so far."""
        return torch.cuda.current_stream(self._stream.device).record_event() if self._stream is not None else None

    @contextmanager
    def after(self, *marks: Mark) -> Generator[None, None, None]:
        """Launch what needs the computation up to these points."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            for mark in marks:
                if mark is not None:
                    self._stream.wait_event(mark)
            yield
