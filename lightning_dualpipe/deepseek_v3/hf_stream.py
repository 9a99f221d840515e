"""Writing the files of a Hugging Face directory one by one, from weights that need not be in memory.

    export_plan(config) ──► a file ──► which elements of which tensor ──read──► hf_fp8 ──► the file

What is written is what ``hf_writer`` writes of the whole model, byte for byte. Files do not depend on each other,
so several processes may share them out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.hf_fp8 import WEIGHT_OPERANDS, is_in_fp8, quantise_weight, scale_key
from lightning_dualpipe.deepseek_v3.hf_plan import PlannedFile, Source
from lightning_dualpipe.deepseek_v3.hf_writer import FileDtype
from lightning_dualpipe.deepseek_v3.safetensors_files import write_shard

__all__ = ["Readable", "write_file"]

_READ_AT_ONCE = 256 * 2**20  # bytes


class Readable(Protocol):
    """A tensor, or what stands for one that is not read yet."""

    @property
    def dtype(self) -> torch.dtype: ...

    def reshape(self, _: int) -> Any:
        """As one line of elements, of which slices can be taken."""


def write_file(
    file: PlannedFile,
    weights: Mapping[str, Readable],
    read: Callable[[Sequence[Any]], Sequence[Tensor]],
    path: Path,
    *,
    dtype: FileDtype,
) -> None:
    """Write one file of the plan that was made for ``dtype``.

    Memory: the file, and 256 MiB of weights as they are stored, or one tensor if it is larger.

    Args:
        weights: by our names.
        read: gives the tensors that slices of ``weights`` stand for.

    Raises:
        ConfigurationError: weights that are to be in FP8 are not finite, or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    keys_by_source: dict[Source, list[str]] = {}
    for key, planned in file.tensors.items():
        if planned.source is None:
            tensors[key] = torch.empty(planned.shape, dtype=planned.dtype)
        else:
            keys_by_source.setdefault(planned.source, []).append(key)
    for sources in _batches(keys_by_source, weights):
        slices = [weights[s.name].reshape(-1)[s.start : s.start + s.numel] for s in sources]
        for source, flat in zip(sources, read(slices), strict=True):
            for key, tensor in _converted(keys_by_source[source], flat.view(source.shape), file, dtype):
                tensors[key] = tensor
    write_shard(tensors, path)


def _batches(sources: Iterable[Source], weights: Mapping[str, Readable]) -> Iterator[list[Source]]:
    """Neighbours are read together, because they may lie in one block, which is read and checked as a whole."""
    batch: list[Source] = []
    size = 0
    for source in sources:
        bytes_of_source = source.numel * weights[source.name].dtype.itemsize
        if batch and size + bytes_of_source > _READ_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(source)
        size += bytes_of_source
    if batch:
        yield batch


def _converted(
    keys: Sequence[str], tensor: Tensor, file: PlannedFile, dtype: FileDtype
) -> Iterator[tuple[str, Tensor]]:
    """What the file has of one source: the tensor, copies of it, or values and scales, which may be in two files."""
    weight = keys[0].removesuffix(scale_key(""))
    if dtype in WEIGHT_OPERANDS and is_in_fp8(weight):
        values, scales = quantise_weight(weight, tensor, WEIGHT_OPERANDS[dtype])
        found = {weight: values, scale_key(weight): scales}
        yield from ((key, found[key]) for key in keys)
    else:
        for key in keys:
            yield key, tensor.detach().to("cpu", file.tensors[key].dtype, copy=True)
