import numpy as np
import pytest

from lightning_dualpipe.data.order import SampleOrder


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 100, 1000, 1023, 1024, 1025])
def test_every_pass_visits_every_sequence_once(num_sequences: int) -> None:
    for seed in range(5):
        order = SampleOrder(num_sequences, seed)
        for number in (0, 1, 2, 1000):
            samples = np.arange(number * num_sequences, (number + 1) * num_sequences)
            assert np.array_equal(np.sort(order(samples)), np.arange(num_sequences))


def test_a_sample_is_the_same_sequence_however_it_is_asked_for() -> None:
    order = SampleOrder(101, seed=3)
    together = order(np.arange(1000))
    assert [int(order(np.array([sample]))[0]) for sample in range(1000)] == together.tolist()


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    first = SampleOrder(1000, seed=0)(np.arange(1000))
    second = SampleOrder(1000, seed=0)(np.arange(1000, 2000))
    other = SampleOrder(1000, seed=1)(np.arange(1000))
    for one, two in ((first, second), (first, other), (second, other)):
        assert np.count_nonzero(one == two) < 10  # about one by chance


def test_seeds_of_any_sign_and_size_are_taken() -> None:
    orders = [SampleOrder(64, seed)(np.arange(64)).tolist() for seed in (0, -1, 2**63, 2**64 + 5)]
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_without_shuffling_sequences_come_in_their_own_order() -> None:
    assert SampleOrder(3, seed=0, shuffle=False)(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_never_changes_from_one_version_to_the_next() -> None:
    """A checkpoint stores a position only, so a new order would break resuming."""
    assert SampleOrder(10, seed=0)(np.arange(12)).tolist() == [4, 0, 8, 6, 1, 5, 3, 9, 2, 7, 9, 0]
    large = SampleOrder(10**9, seed=7)
    assert large(np.array([0, 1, 10**9 - 1, 10**9])).tolist() == [318631882, 727698128, 938322008, 921515219]


def test_neighbours_are_as_unrelated_as_in_a_random_permutation() -> None:
    """Correlation of successive indices over 200 seeds: standard deviation 1 / sqrt(N), within 15 %."""
    permutations = [SampleOrder(1000, seed)(np.arange(1000)) for seed in range(200)]
    for lag in (1, 2, 3):
        correlations = [np.corrcoef(p[:-lag], p[lag:])[0, 1] for p in permutations]
        assert 0.85 < np.std(correlations) * np.sqrt(1000) < 1.15


def test_each_place_gets_each_sequence_equally_often() -> None:
    """A table of 16 x 16 parts of the range, 4000 expected in each: chi-square, 225 degrees of freedom, ± 5 sigma."""
    length, seeds = 1024, 1000
    counts = np.zeros((16, 16))
    for seed in range(seeds):
        np.add.at(counts, (np.arange(length) // 64, SampleOrder(length, seed)(np.arange(length)) // 64), 1)
    chi_square = np.sum((counts - 4000) ** 2 / 4000)
    assert abs(chi_square - 225) < 5 * np.sqrt(2 * 225)
