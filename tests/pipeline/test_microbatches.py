import pytest
import torch

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.pipeline.microbatches import check_batch, choose_num_microbatches, num_samples, split


@pytest.mark.parametrize(
    ("samples", "num_ranks", "expected"),
    [
        (16, 4, 8),  # twice the ranks divides
        (20, 4, 10),  # the next number that does
        (18, 4, 9),
        (12, 4, 12),  # one sample each
        (17, 4, 17),  # a prime
        (34, 4, 17),
        (8, 4, 8),
        (3, 4, 3),  # fewer samples than the pipeline could use
        (1, 2, 1),
        (0, 2, 1),
        (64, 1, 1),  # one rank: nothing to overlap
    ],
)
def test_auto_is_the_smallest_divisor_that_fills_a_dualpipe(samples, num_ranks, expected):
    assert choose_num_microbatches(samples, "auto", num_ranks=num_ranks) == expected


def test_a_number_that_was_asked_for_is_taken():
    assert choose_num_microbatches(16, 5, num_ranks=4) == 5


@pytest.mark.parametrize(
    ("samples", "num_microbatches", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (7, 3, [3, 2, 2]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0]), (5, 1, [5])],
)
def test_pieces_differ_by_one_sample_at_most(samples, num_microbatches, sizes):
    batch = {"input_ids": torch.arange(3 * samples).view(samples, 3), "labels": torch.arange(samples)}
    pieces = split(batch, num_microbatches)

    assert [num_samples(piece) for piece in pieces] == sizes
    for name, value in batch.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), value)
        memory = value.untyped_storage().data_ptr()
        assert all(piece[name].untyped_storage().data_ptr() == memory for piece in pieces)  # nothing is copied


def test_a_batch_of_named_tensors_is_taken_as_it_is():
    batch = {"input_ids": torch.zeros(4, 3), "weights": torch.zeros(4)}
    assert check_batch(batch) is batch


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3), "batch of named tensors, got Tensor"),
        ((torch.zeros(3), torch.zeros(3)), "got tuple; call the model with a dictionary"),
        ({}, "got dict"),
        (None, "got NoneType"),
        ({"x": torch.zeros(3), "name": ["a", "b", "c"]}, "name of the batch cannot be split"),
        ({"x": torch.zeros(3), "scale": torch.tensor(2.0)}, "scale of the batch cannot be split"),
        ({"x": torch.zeros(3), "y": torch.zeros(4, 3)}, r"different numbers of samples .*'x': 3, 'y': 4"),
    ],
)
def test_what_cannot_be_split_is_refused_with_a_reason(batch, message):
    with pytest.raises(ConfigurationError, match=message):
        check_batch(batch)
