"""What a rank saves, as it is at one moment, though training goes on: copies in host memory that is kept for the next.

    save                       ``take``: weights, and all else that anybody may write to, are copied at once
    forward and backward       the thread that writes copies the rest: what nothing but an optimizer's step changes
    before that step           ``settle``: waits for these copies, or makes those that are not made yet

New memory costs more than the copy into it, because the system clears each page at its first touch; so it is kept.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_dualpipe.checkpoint.index import Key
from lightning_dualpipe.checkpoint.writer import Piece
from lightning_dualpipe.errors import CheckpointError

__all__ = ["Snapshot", "Snapshots"]


class Snapshots:
    """Takes one after the other into the same memory, so that there is one copy of this rank's share at most.

    Whoever takes the next has waited until the one before it is written.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Key, int], Tensor] = {}
        self._last: Snapshot | None = None

    def take(self, pieces: Sequence[Piece]) -> "Snapshot":
        """Of pieces that are ``steady`` the values are copied by whoever looks at the snapshot, or by ``settle``."""
        self._memory = {(piece.key, piece.start): self._room_for(piece) for piece in pieces}
        self._last = Snapshot(list(zip(pieces, self._memory.values(), strict=True)))
        return self._last

    def settle(self) -> None:
        """From here on anything may be written to."""
        if self._last is not None:
            self._last.settle()

    def release(self) -> None:
        """Give the memory back."""
        self._memory, self._last = {}, None

    def _room_for(self, piece: Piece) -> Tensor:
        kept, values = self._memory.get((piece.key, piece.start)), piece.values
        if kept is not None and (kept.shape, kept.dtype) == (values.shape, values.dtype):
            return kept
        return torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)


class Snapshot:
    """The pieces, to be iterated over by one thread.

    Raises:
        CheckpointError: when iterated over: one was written to before it was copied.
    """

    def __init__(self, copies: Sequence[tuple[Piece, Tensor]]) -> None:
        self._copies = [replace(piece, values=room) for piece, room in copies]
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        # an inference tensor does not count the writes to it
        at_once = [each for each in copies if not each[0].steady or each[0].values.is_inference()]
        self._rest = deque(
            (piece, room, piece.values._version)
            for piece, room in copies
            if piece.steady and not piece.values.is_inference()
        )
        for piece, room in at_once:
            room.copy_(piece.values.detach(), non_blocking=True)
        for device in {piece.values.device for piece, _ in copies if piece.values.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # of the rest too, what was computed is there now

    def __iter__(self) -> Iterator[Piece]:
        self.settle()
        if self._failure is not None:
            raise self._failure
        return iter(self._copies)

    def settle(self) -> None:
        """A failure is that of the save, which tells all ranks; training has no part in it."""
        with self._lock:
            try:
                while self._rest:
                    _copy(*self._rest[0])
                    self._rest.popleft()  # only now: an interrupt in between leaves it to the thread that writes
            except Exception as error:
                self._failure = error
                self._rest.clear()


def _copy(piece: Piece, room: Tensor, version: int) -> None:
    values = piece.values.detach()
    if values.is_cuda:  # beside what computes
        stream = torch.cuda.Stream(values.device)
        with torch.cuda.stream(stream):
            room.copy_(values, non_blocking=True)
        stream.synchronize()
    else:
        room.copy_(values)
    if piece.values._version != version:
        raise CheckpointError(
            f"{piece.key} was written to while it was being saved, and not by the step of its optimizer; change what "
            "an optimizer keeps in its step, or use save_distributed_checkpoint=True, which nothing runs beside"
        )
