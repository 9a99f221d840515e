"""From documents to sequences of equal length.

    tokens    │ doc 0 │   doc 1   │ doc 2 │ doc 3 │ …        train: 0, 1, 3, …   validation: 2, …
    train     │ doc 0 │   doc 1   │ doc 3 │ …
    sequences [ T tokens ][ T tokens ][ T tokens ] …          each also sees the first token of the next,
                                                              so that every token is predicted once
A split is a list of *runs*, stretches of the token file that lie together; reading a sequence touches
the runs it crosses and nothing else. Documents meet within a sequence, and attention looks across
(arXiv:2412.19437, section 4.1). Only the last tokens of a split, fewer than T, are in no sequence.

Validation takes documents in the order of a hash of (seed, name of the document) until it has its
fraction of the tokens. The document with which it would have more is cut: its end is validation, its
beginning training. So a corpus of one file has a validation split too, and files that come or go
hardly move the others between the splits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dualpipe.data.cache import TokenCache
from lightning_dualpipe.data.order import SampleOrder, mix
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["PackedSequences", "Runs", "check_lengths", "split_documents"]

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

CHUNK = 1 << 20  # documents looked at together
LOWER_BITS = np.uint64(48)  # of a hash; the upper 16 divide documents into groups


@dataclass(frozen=True)
class Runs:
    """Stretches of a token file that follow each other in a split."""

    starts: Integers  # in the file
    ends: Integers  # in the split: tokens up to and with each run

    @classmethod
    def of(cls, starts: Integers, lengths: Integers) -> "Runs":
        """Joins stretches that touch."""
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        first = np.ones(len(starts), dtype=bool)
        first[1:] = starts[1:] != starts[:-1] + lengths[:-1]
        totals = np.cumsum(lengths)
        last = np.roll(first, -1) if len(first) else first
        return cls(starts[first], totals[last])

    @classmethod
    def joined(cls, parts: Sequence["Runs"]) -> "Runs":
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64))
        lengths = [np.diff(part.ends, prepend=0) for part in parts]
        return cls.of(np.concatenate([part.starts for part in parts]), np.concatenate(lengths))

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, tokens: npt.NDArray[Any], first: int, out: Integers) -> None:
        """Fills ``out`` with the tokens of the split from ``first`` on."""
        run = int(np.searchsorted(self.ends, first, side="right"))
        filled = 0
        while filled < len(out):
            left = int(self.ends[run]) - first
            before = int(self.ends[run - 1]) if run else 0
            start = int(self.starts[run]) + first - before
            count = min(left, len(out) - filled)
            out[filled : filled + count] = tokens[start : start + count]
            filled, first, run = filled + count, first + count, run + 1


def split_documents(documents: npt.NDArray[np.void], *, seed: int, validation_fraction: float) -> tuple[Runs, Runs]:
    """(train, validation) of the documents of a cache (``TokenCache.documents``)."""
    wanted = round(int(documents["end"][-1]) * validation_fraction) if len(documents) else 0
    threshold, partly = _validation_rule(documents, seed, wanted)
    kept, held_out = [], []
    for index, starts, lengths, hashes in _in_chunks(documents, seed):
        out = np.where(hashes >> LOWER_BITS < threshold, lengths, 0)
        for document, length in partly.items():
            if index <= document < index + len(out):
                out[document - index] = length
        kept.append(Runs.of(starts, lengths - out))
        held_out.append(Runs.of(starts + lengths - out, out))
    return Runs.joined(kept), Runs.joined(held_out)


def _validation_rule(documents: npt.NDArray[np.void], seed: int, wanted: int) -> tuple[np.uint64, dict[int, int]]:
    """Which documents are for validation, so that they have ``wanted`` tokens: (group, some of its documents).

    All of the groups before this one are. Of the documents in it, few enough to be sorted, the second value
    says how many of their last tokens are, by index. Sorting all would take 64 bytes a document.
    """
    tokens_of = np.zeros(1 << 16)
    for _, _, lengths, hashes in _in_chunks(documents, seed):
        tokens_of += np.bincount((hashes >> LOWER_BITS).astype(np.int64), weights=lengths, minlength=len(tokens_of))
    below = np.concatenate([[0], np.cumsum(tokens_of)]).astype(np.int64)
    threshold = np.uint64(np.searchsorted(below[1:], wanted, side="right"))  # one past the last where all are taken
    left = wanted - int(below[threshold])
    candidates = [
        (int(hashes[place]), index + int(place), int(lengths[place]))
        for index, _, lengths, hashes in _in_chunks(documents, seed)
        for place in np.flatnonzero(hashes >> LOWER_BITS == threshold)
    ]
    partly = {}
    for _, document, length in sorted(candidates):
        partly[document] = min(left, length)
        left -= partly[document]
    return threshold, partly


def _in_chunks(documents: npt.NDArray[np.void], seed: int) -> Iterator[tuple[int, Integers, Integers, Words]]:
    """(index of the first, starts, lengths, hashes) of some documents at a time."""
    key = mix(np.array([seed & ((1 << 64) - 1)], dtype=np.uint64))
    start = 0
    for index in range(0, len(documents), CHUNK):
        chunk = documents[index : index + CHUNK]
        lengths = np.diff(chunk["end"], prepend=start)
        yield index, chunk["end"] - lengths, lengths, mix(chunk["id"] ^ key)
        start = int(chunk["end"][-1])


def check_lengths(
    train: Runs, validation: Runs, *, sequence_length: int, validation_fraction: float, path: object
) -> None:
    """Raise where a split that is wanted has not one sequence."""
    total, needed = train.num_tokens + validation.num_tokens, sequence_length + 1
    if total == 0:
        raise ConfigurationError(f"path={path}: the corpus has no text; all its files are empty")
    wanted = {"training": train} | ({"validation": validation} if validation_fraction else {})
    problems = [
        f"the {name} split has {runs.num_tokens:,} of {total:,} tokens, and one sequence takes {needed:,}"
        for name, runs in wanted.items()
        if runs.num_tokens < needed
    ]
    if problems:
        raise ConfigurationError.of(
            f"sequence_length={sequence_length} and validation_fraction={validation_fraction} leave no sequence: "
            "choose shorter sequences, another fraction (0: no validation) or a larger corpus",
            problems,
        )


@dataclass
class PackedSequences(Dataset[dict[str, Tensor]]):
    """The sequences of a split. Its items are batches, its keys ranges of samples. Cheap to send to a worker."""

    cache: TokenCache
    runs: Runs
    sequence_length: int
    order: SampleOrder | None = None  # None: samples are sequences
    with_labels: bool = True

    def __len__(self) -> int:
        """How many sequences there are."""
        return max(self.runs.num_tokens - 1, 0) // self.sequence_length

    def __getitem__(self, samples: range) -> dict[str, Tensor]:
        """The batch of these samples: ``input_ids`` and ``labels``, int64 [B, T]."""
        indices = np.arange(samples.start, samples.stop)
        sequences = self.order(indices) if self.order is not None else indices
        window = np.empty((len(sequences), self.sequence_length + 1), dtype=np.int64)
        for row, sequence in zip(window, sequences, strict=True):
            self.runs.read(self._memory, int(sequence) * self.sequence_length, row)
        batch = {"input_ids": torch.from_numpy(np.ascontiguousarray(window[:, :-1]))}
        if self.with_labels:
            batch["labels"] = torch.from_numpy(np.ascontiguousarray(window[:, 1:]))
        return batch

    @cached_property
    def _memory(self) -> npt.NDArray[Any]:
        return self.cache.tokens()

    def __getstate__(self) -> dict[str, Any]:
        """A pickled memory map would carry the whole corpus along; the other process opens its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_memory"}
