"""Loaders that Lightning takes as they are.

They are no ``DataLoader`` s, so no sampler is injected: each reads its own data rank's share of every
global batch, as ``data.batches`` divides it. A ``DataLoader`` inside does the work, with worker
processes if asked for. It has a generator of its own, because one without draws from the process's
random state, and a model's dropout would depend on how often its data were opened.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dualpipe.data.batches import GlobalBatches
from lightning_dualpipe.data.packing import PackedSequences

__all__ = ["EvaluationLoader", "Reader", "TrainingLoader"]

TokenBatch = dict[str, Tensor]


@dataclass(frozen=True)
class Reader:
    """How samples become batches in memory."""

    num_workers: int = 0
    pin_memory: bool = False

    def read(self, dataset: PackedSequences, shares: Iterable[range]) -> Iterator[TokenBatch]:
        loader: DataLoader[TokenBatch] = DataLoader(
            dataset,
            batch_size=None,
            sampler=shares,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )
        yield from loader


class EvaluationLoader:
    """Reads the same batches, from the first, each time it is iterated."""

    def __init__(self, dataset: PackedSequences, shares: list[range], reader: Reader) -> None:
        self.dataset = dataset
        self._shares = shares
        self._reader = reader

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self._reader.read(self.dataset, self._shares)


class TrainingLoader:
    """The stream of training batches in parts of one epoch: each iteration goes on where the last one stopped.

    Args:
        rank: the data rank whose shares are read.
        start: the sample of the stream with which to begin.
        steps_finished: how many batches have been trained on, counted from any time before the first is
            read. By default batches count when they are read.
        repeat: begin at ``start`` in every iteration (Lightning's ``overfit_batches``).
    """

    def __init__(
        self,
        dataset: PackedSequences,
        batches: GlobalBatches,
        reader: Reader,
        *,
        rank: int,
        start: int,
        steps_finished: Callable[[], int] | None = None,
        repeat: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self._reader = reader
        self._rank = rank
        self._count_finished = steps_finished
        self._repeat = repeat
        self._begin(start)

    def _begin(self, start: int) -> None:
        self._start = start
        self._read = 0
        self._stream: Iterator[TokenBatch] | None = None
        self._finished_before = self._steps_finished()

    def _steps_finished(self) -> int:
        return self._read if self._count_finished is None else self._count_finished()

    def __len__(self) -> int:
        """Steps of an epoch: those of one pass from the very beginning, so that all epochs are equally long.

        Lightning counts with one length for all epochs. With a constant batch size this is a pass less
        the samples that do not fill a batch, with which the next epoch begins.
        """
        return self.batches.steps_within(0, len(self.dataset))

    def __iter__(self) -> Iterator[TokenBatch]:
        if self._repeat:
            self._begin(self._start)
        for _ in range(len(self)):
            if self._stream is None:
                first = self.batches.after(self._start, self._read)
                self._stream = self._reader.read(self.dataset, self.batches.shares(first, self._rank))
            batch = next(self._stream)
            self._read += 1
            yield batch

    def consumed_samples(self) -> int:
        """How far into the stream training has come; what was only read ahead does not count."""
        return self.batches.after(self._start, self._steps_finished() - self._finished_before)

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.consumed_samples()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin(state["samples"])

    def close(self) -> None:
        """Stops the worker processes."""
        self._stream = None
