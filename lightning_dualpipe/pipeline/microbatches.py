"""Split a batch into microbatches along dimension 0, the samples.

Losses are sums over tokens divided by the number of tokens in the whole global batch, so pieces of
unequal size are exact; equal ones are faster.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Batch

__all__ = ["check_batch", "choose_num_microbatches", "num_samples", "split"]


def check_batch(batch: object) -> Batch:
    """The batch itself, if the model can be called with it in a pipeline.

    Raises:
        ConfigurationError: it is not a mapping of tensors with one and the same number of samples.
    """
    remedy = 'call the model with a dictionary of tensors, such as {"input_ids": ..., "labels": ...}'
    if not isinstance(batch, Mapping) or not batch:
        raise ConfigurationError(f"a pipeline splits a batch of named tensors, got {type(batch).__name__}; {remedy}")
    odd = [name for name, value in batch.items() if not isinstance(value, Tensor) or value.ndim == 0]
    if odd:
        raise ConfigurationError(f"{', '.join(odd)} of the batch cannot be split into microbatches; {remedy}")
    rows = {name: value.shape[0] for name, value in batch.items()}
    if len(set(rows.values())) > 1:
        raise ConfigurationError(f"tensors of one batch have different numbers of samples (dimension 0): {rows}")
    return batch


def num_samples(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def choose_num_microbatches(samples: int, wanted: int | Literal["auto"], *, num_ranks: int) -> int:
    """How many microbatches a training batch of ``samples`` makes on ``num_ranks`` pipeline ranks.

    ``"auto"``: the smallest divisor of ``samples`` that fills a DualPipe (2 x ranks), else ``samples``.
    """
    if wanted != "auto":
        return wanted
    if num_ranks == 1:
        return 1
    return next((n for n in range(2 * num_ranks, samples) if samples % n == 0), max(samples, 1))


def split(batch: Batch, num_microbatches: int) -> list[Batch]:
    """Views of ``batch``, in order, whose sizes differ by one sample at most (empty ones last)."""
    pieces = {name: value.tensor_split(num_microbatches) for name, value in batch.items()}
    return [{name: parts[index] for name, parts in pieces.items()} for index in range(num_microbatches)]
