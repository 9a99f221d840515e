"""Which samples make up each step: the arithmetic of batch sizes and of data ranks.

    stream of samples  ─►  │ global batch │ global batch │   global batch   │ …
                             rank 0│rank 1  rank 0│rank 1   rank 0 │ rank 1      (two data ranks)

A batch size counts sequences per data rank, as everywhere in Lightning, so a step takes ``batch_size x
ranks`` samples from the stream, and each rank a contiguous share. Runs with the same product read the
same global batches.

A batch size may grow with the tokens consumed (DeepSeek-V3, arXiv:2412.19437, section 4.2: from 3072
to 15360 sequences over the first 469 billion tokens, then constant).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["BatchSizeRamp", "GlobalBatches", "evaluation_shares"]

ENDLESS = 1 << 62


@dataclass(frozen=True)
class BatchSizeRamp:
    """A batch size that grows with the tokens consumed, in equal steps.

    Args:
        start: sequences per data rank at first.
        end: sequences per data rank from ``tokens`` on; the batch size never shrinks.
        tokens: how many tokens, of all ranks together, are consumed until ``end`` is reached.
        increment: by how much it grows at once, for instance a multiple of the number of microbatches.
    """

    start: int
    end: int
    tokens: int | float  # 469e9 reads better than its digits
    increment: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", round(self.tokens))
        problems = []
        if not 1 <= self.start <= self.end:
            problems.append(f"start={self.start}, end={self.end}: 1 <= start <= end is needed")
        if self.tokens < 1:
            problems.append(f"tokens={self.tokens}: at least 1 is needed")
        if self.increment < 1 or (self.end - self.start) % self.increment:
            problems.append(f"increment={self.increment} must divide end - start = {self.end - self.start}")
        if problems:
            raise ConfigurationError.of("this batch size schedule cannot be followed", problems)

    @property
    def num_increments(self) -> int:
        return (self.end - self.start) // self.increment


@dataclass(frozen=True)
class GlobalBatches:
    """The training steps as intervals of the stream of samples."""

    ramp: BatchSizeRamp
    sequence_length: int
    num_ranks: int

    @classmethod
    def of(cls, batch_size: int | BatchSizeRamp, *, sequence_length: int, num_ranks: int) -> "GlobalBatches":
        ramp = batch_size if isinstance(batch_size, BatchSizeRamp) else BatchSizeRamp(batch_size, batch_size, tokens=1)
        return cls(ramp, sequence_length, num_ranks)

    def size(self, sample: int) -> int:
        """Samples in the step that begins at ``sample``."""
        return self._level_size(self._level(sample))

    def after(self, sample: int, steps: int) -> int:
        """Where the stream stands when ``steps`` steps from ``sample`` on are done."""
        for first, size, count in self._constant_stretches(sample):
            if steps <= count:
                return first + steps * size
            steps -= count
        raise AssertionError("the last stretch has no end")

    def steps_within(self, sample: int, end: int) -> int:
        """How many whole steps from ``sample`` on fit before sample ``end``."""
        steps = 0
        for first, size, count in self._constant_stretches(sample):
            fitting = max(end - first, 0) // size
            if fitting < count:
                return steps + fitting
            steps += count
        raise AssertionError("the last stretch has no end")

    def shares(self, sample: int, rank: int) -> Iterator[range]:
        """What ``rank`` reads in each step from ``sample`` on, endlessly."""
        while True:
            size = self.size(sample)
            share = size // self.num_ranks
            yield range(sample + rank * share, sample + (rank + 1) * share)
            sample += size

    def _constant_stretches(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Runs of steps of one size: first sample, samples a step, number of steps (the last has no end)."""
        level = self._level(sample)
        while level < self.ramp.num_increments:
            size = self._level_size(level)
            count = -(-(self._level_start(level + 1) - sample) // size)
            yield sample, size, count
            sample += count * size
            level = self._level(sample)
        yield sample, self._level_size(level), ENDLESS

    def _level(self, sample: int) -> int:
        """How many increments the batch size has seen when ``sample`` begins a step."""
        passed = sample * self.sequence_length * self.ramp.num_increments // int(self.ramp.tokens)
        return min(passed, self.ramp.num_increments)

    def _level_start(self, level: int) -> int:
        """The first sample with at least ``level`` increments."""
        return -(-level * int(self.ramp.tokens) // (self.sequence_length * self.ramp.num_increments))

    def _level_size(self, level: int) -> int:
        return (self.ramp.start + level * self.ramp.increment) * self.num_ranks


def evaluation_shares(num_samples: int, batch_size: int, *, num_ranks: int, rank: int) -> list[range]:
    """What ``rank`` reads of ``num_samples`` to evaluate each once, in order, in equally many batches on every rank.

    All batches are full but the last, which is divided as evenly as possible. Where that would leave a rank
    with nothing, the last two batches are divided anew; only where there are fewer samples than that
    takes (one sequence a batch, or fewer sequences than ranks) is the last sample read more than once.
    """
    full, rest = divmod(num_samples, batch_size * num_ranks)
    sizes = [batch_size * num_ranks] * full + [rest] * bool(rest)
    if full and 0 < rest < num_ranks:
        together = sizes.pop() + sizes.pop()
        sizes += [together - together // 2, together // 2]
    shares, first = [], 0
    for size in sizes:
        share = range(first + size * rank // num_ranks, first + size * (rank + 1) // num_ranks)
        shares.append(share or range(first + size - 1, first + size))
        first += size
    return shares
