"""In which order a corpus is read: arithmetic, without state.

Training reads one endless stream of samples. Sample ``s`` belongs to pass ``s // N`` over the ``N``
sequences of the corpus, and every pass visits each of them once:

    sequence(s) = permutation(seed, s // N) [ s % N ]

So how many samples were consumed is all that a run must remember to go on exactly where it stopped,
and neither the number of ranks, nor of workers, nor the batch size changes what comes next.

The permutation is a keyed bijection (a Feistel network on just enough bits, repeated until it lands
below ``N``) rather than ``torch.randperm``: it takes no memory where a corpus of 10^9 sequences would
need 8 GB a process, any position costs the same, and, being integer arithmetic alone, it is the same
on every machine and with every version of torch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SampleOrder", "mix"]

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_ROUNDS = 12  # the halves are small and the hash is simple; with 6, neighbours are measurably correlated
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Maps samples of the endless stream to the ``num_sequences`` sequences of a corpus."""

    num_sequences: int
    seed: int
    shuffle: bool = True

    def __call__(self, samples: Integers) -> Integers:
        """The sequence that each sample is; samples may lie in different passes."""
        passes, positions = np.divmod(samples, self.num_sequences)
        if not self.shuffle:
            return positions
        sequences = np.empty_like(positions)
        for number in np.unique(passes):
            here = passes == number
            sequences[here] = _permute(positions[here], self.num_sequences, keys=_keys(self.seed, int(number)))
        return sequences


def _permute(positions: Integers, length: int, keys: Words) -> Integers:
    """A bijection of ``range(length)``, at the given positions."""
    words = positions.astype(np.uint64)
    outside = np.arange(len(words))
    while len(outside):  # the network permutes the next power of two; what lands outside goes round again
        words[outside] = _feistel(words[outside], (length - 1).bit_length(), keys)
        outside = np.flatnonzero(words >= length)
    return words.astype(np.int64)


def _feistel(words: Words, bits: int, keys: Words) -> Words:
    """A bijection of the numbers below ``2 ** bits``.

    A round swaps the halves and adds to one a hash of the other, by multiply-shift with a random key.
    """
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = words >> np.uint64(right_bits), words & np.uint64((1 << right_bits) - 1)
    for factor, offset in keys:
        hashed = (right * factor + offset) >> np.uint64(40)
        left, right = right, left ^ (hashed & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _keys(seed: int, number: int) -> Words:
    """Odd factor and offset of each round, from the seed and the number of the pass."""
    base = mix(mix(np.array([seed & _WORD], dtype=np.uint64)) + np.uint64(number))
    keys = mix(base + np.arange(2 * _ROUNDS, dtype=np.uint64) * np.uint64(_GOLDEN)).reshape(_ROUNDS, 2)
    keys[:, 0] |= np.uint64(1)
    return keys


def mix(words: Words) -> Words:
    """Scatters 64-bit words: a bijection whose every output bit depends on all input bits (SplitMix64)."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
