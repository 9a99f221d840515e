"""What a signal to one rank asks of all of them: done by all, between two batches, instead of anywhere.

A signal comes to whichever rank, wherever it happens to be, and not to all at the same moment. Where the answer is a
collective (a checkpoint, say), a rank that began it in the middle of a batch would wait for others who wait for it.
So a signal only leaves a note; after each batch the ranks look whether any of them has one, and then all act.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override

__all__ = ["BetweenBatches", "written_at_once"]


class BetweenBatches(Callback, ABC):
    """Acts once: the last rank may get its signal when all have acted.

    Not during prediction, where pipelines may have different numbers of batches.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._done = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """In place of a signal handler."""
        self._noted = number

    @abstractmethod
    def _agree(self, trainer: Trainer, noted: int) -> int:
        """A signal that any of the ranks has noted, the same on all; 0: none. A collective."""

    @abstractmethod
    def _act(self, trainer: Trainer, number: int) -> None: ...

    def _look(self, trainer: Trainer) -> None:
        if self._done or trainer.sanity_checking:
            return
        if number := self._agree(trainer, self._noted):
            self._done = True
            self._act(trainer, number)

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._look(trainer)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._look(trainer)

    @override
    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._look(trainer)


@contextmanager
def written_at_once(strategy: Any) -> Iterator[None]:
    """No checkpoint is left to the background: the process ends soon, and what is not written then is lost."""
    how = getattr(strategy, "save_distributed_checkpoint", None)
    if how != "async":
        yield
        return
    strategy.save_distributed_checkpoint = True
    try:
        yield
    finally:
        strategy.save_distributed_checkpoint = how
