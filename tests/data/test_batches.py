from itertools import islice

import pytest

from lightning_dualpipe.data.batches import BatchSizeRamp, GlobalBatches, evaluation_shares
from lightning_dualpipe.errors import ConfigurationError

RAMPS = [
    BatchSizeRamp(4, 4, tokens=1),
    BatchSizeRamp(1, 5, tokens=1000),
    BatchSizeRamp(2, 10, tokens=777, increment=4),
    BatchSizeRamp(1, 100, tokens=50),  # leaps over several increments in one step
    BatchSizeRamp(3, 9, tokens=10_000, increment=6),
]


def sizes_step_by_step(ramp: BatchSizeRamp, *, sequence_length: int, num_ranks: int, steps: int) -> list[int]:
    """The definition: before each step, the share of the ramp's tokens that was consumed, in whole increments."""
    sizes, samples = [], 0
    for _ in range(steps):
        increments = (ramp.end - ramp.start) // ramp.increment
        passed = min(samples * sequence_length * increments // ramp.tokens, increments)
        sizes.append((ramp.start + passed * ramp.increment) * num_ranks)
        samples += sizes[-1]
    return sizes


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_arithmetic_agrees_with_going_step_by_step(ramp: BatchSizeRamp, num_ranks: int) -> None:
    batches = GlobalBatches.of(ramp, sequence_length=7, num_ranks=num_ranks)
    sizes = sizes_step_by_step(ramp, sequence_length=7, num_ranks=num_ranks, steps=400)
    starts = [sum(sizes[:step]) for step in range(401)]

    assert [batches.size(start) for start in starts[:-1]] == sizes
    assert [batches.after(0, step) for step in range(401)] == starts
    for step in (1, 17, 399):
        assert batches.after(starts[step], 400 - step) == starts[400]
    for end in (0, 1, 5, starts[3] - 1, starts[3], starts[3] + 1, starts[399]):
        whole = sum(start + size <= end for start, size in zip(starts, sizes, strict=False))
        assert batches.steps_within(0, end) == whole


def test_the_shares_of_all_ranks_are_the_global_batch() -> None:
    ramp = BatchSizeRamp(1, 4, tokens=90)
    whole = GlobalBatches.of(ramp, sequence_length=5, num_ranks=2)
    steps = zip(*(islice(whole.shares(3, rank), 20) for rank in range(2)), strict=True)
    expected = 3
    for left, right in steps:
        assert [*left, *right] == list(range(expected, expected + whole.size(expected)))
        assert len(left) == len(right)
        expected = right.stop


def test_more_ranks_with_smaller_batches_read_the_same_global_batches() -> None:
    one = GlobalBatches.of(12, sequence_length=8, num_ranks=1)
    four = GlobalBatches.of(3, sequence_length=8, num_ranks=4)
    for step, whole in enumerate(islice(one.shares(0, 0), 5)):
        parts = [next(islice(four.shares(0, rank), step, None)) for rank in range(4)]
        assert [sample for part in parts for sample in part] == list(whole)


def test_the_schedule_of_the_technical_report() -> None:
    """arXiv:2412.19437, section 4.2: 3072 to 15360 sequences of 4096 tokens over the first 469 billion tokens."""
    ramp = BatchSizeRamp(3072 // 128, 15360 // 128, tokens=469e9, increment=24)
    assert ramp == BatchSizeRamp(24, 120, tokens=469_000_000_000, increment=24)
    batches = GlobalBatches.of(ramp, sequence_length=4096, num_ranks=128)
    at = [batches.size(int(tokens * 1e9) // 4096) for tokens in (0, 117, 118, 235, 352, 468.9, 469.1, 14_800)]
    assert at == [3072, 3072, 6144, 9216, 12288, 12288, 15360, 15360]
    assert 14_800e9 // 4096 / 15360 < batches.steps_within(0, int(14_800e9) // 4096) < 14_800e9 // 4096 / 3072


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"start": 0, "end": 4, "tokens": 10}, "start=0"),
        ({"start": 4, "end": 2, "tokens": 10}, "end=2"),
        ({"start": 4, "end": 8, "tokens": 0}, "tokens=0"),
        ({"start": 4, "end": 9, "tokens": 10, "increment": 2}, "increment=2"),
        ({"start": 4, "end": 9, "tokens": 10, "increment": 0}, "increment=0"),
    ],
)
def test_a_ramp_that_cannot_be_followed_says_why(given: dict[str, int], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        BatchSizeRamp(**given)


@pytest.mark.parametrize("num_samples", [0, 1, 3, 7, 8, 9, 16, 17, 23, 24, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_evaluation_reads_every_sample_on_equally_many_batches_a_rank(
    num_samples: int, batch_size: int, num_ranks: int
) -> None:
    ranks = [evaluation_shares(num_samples, batch_size, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
    assert len({len(shares) for shares in ranks}) == 1
    assert all(0 < len(share) <= batch_size for shares in ranks for share in shares)
    in_order = [sample for step in zip(*ranks, strict=True) for share in step for sample in share]
    assert sorted(set(in_order)) == list(range(num_samples))
    if num_ranks == 1 or (batch_size > 1 and num_samples >= num_ranks * batch_size):
        assert in_order == list(range(num_samples))  # each once, in order
