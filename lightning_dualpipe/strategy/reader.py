"""One reader per pipeline.

All ranks of a pipeline must see the same batch, and both ends of a DualPipe need its inputs and its
labels. So the first rank iterates the user's loader, whatever it is (map-style or iterable, sized
or not, stateful, random), and the others receive what it read. They start no workers and touch no
files; a loader whose order depends on the process's random state cannot make them disagree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["PipelineReader", "check_lengths", "warn_of_stream"]


def check_lengths(loader: object, group: dist.ProcessGroup | None) -> None:
    """Of the loaders of data ranks that meet in every batch. A collective; loaders without a length pass.

    Raises:
        ConfigurationError: some have more batches than others, who would be waited for in vain.
    """
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return
    if group is None:
        return
    lengths = [length] * dist.get_world_size(group)
    dist.all_gather_object(lengths, length, group=group)
    if len(set(lengths)) > 1:
        raise ConfigurationError(
            f"the data ranks have {lengths} batches, and all take part in each other's: in sums of losses, or because "
            "experts are spread; give each the same number: drop or add samples until they divide evenly among "
            f"{len(lengths)} data ranks, or use one data rank"
        )


@dataclass(frozen=True)
class _Slot:
    """Where a tensor was taken out of a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class PipelineReader:
    """Iterates ``loader`` on the first rank of ``group`` and gives every rank its batches.

    Everything else about the loader (``sampler``, ``dataset``, ``state_dict``, length, …) is the loader's own.
    """

    def __init__(self, loader: Any, group: dist.ProcessGroup) -> None:
        self._loader = loader
        self._group = group

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def __iter__(self) -> Iterator[Any]:
        if dist.get_rank(self._group) == 0:
            return self._read()
        return self._receive()

    @classmethod
    def of(cls, loader: Any, group: dist.ProcessGroup) -> "PipelineReader":
        if isinstance(loader, PipelineReader):  # a CombinedLoader keeps what an earlier Trainer has put into it
            loader = loader._loader
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        return (_StatefulPipelineReader if stateful else cls)(loader, group)

    def _read(self) -> Iterator[Any]:
        for index, batch in enumerate(self._loader):
            tensors: list[Tensor] = []

            def take_out(tensor: Tensor, tensors: list[Tensor] = tensors) -> _Slot:
                tensors.append(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())
                return _Slot(tuple(tensor.shape), tensor.dtype)

            skeleton = apply_to_collection(batch, Tensor, take_out)
            seen = self._seen_batch_indices
            self._broadcast_object((True, skeleton, None if seen is None else seen[index]))
            for tensor in tensors:
                self._broadcast_tensor(tensor)
            yield batch
        self._broadcast_object((False, None, None))

    def _receive(self) -> Iterator[Any]:
        if (seen := self._seen_batch_indices) is not None:
            seen.clear()
        while True:
            more, skeleton, indices = self._broadcast_object(None)
            if not more:
                return
            if seen is not None:
                seen.append(indices)
            # slots are visited in the order in which they were taken out
            yield apply_to_collection(skeleton, _Slot, lambda slot: self._broadcast_tensor(_empty(slot)))

    @property
    def _seen_batch_indices(self) -> list[list[int]] | None:
        """Where Lightning looks for the samples of a batch that was predicted; with workers, it runs ahead."""
        sampler = getattr(self._loader, "batch_sampler", None)
        if not isinstance(sampler, _IndexBatchSamplerWrapper):
            return None
        # the wrapper makes the list only when it is iterated
        seen: list[list[int]] = vars(sampler).setdefault("seen_batch_indices", [])
        return seen

    def _broadcast_object(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def _broadcast_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.numel():  # as bytes: gloo does not know every dtype
            dist.broadcast(tensor.flatten().view(torch.uint8), group=self._group, group_src=0)
        return tensor


class _StatefulPipelineReader(PipelineReader):
    """With the methods of its own by which Lightning recognises a loader that can go on where it stopped."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)


def warn_of_stream(loader: Any) -> None:
    """An iterable dataset divides itself among readers, if at all, and by what we cannot see."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        rank_zero_warn(
            f"{type(loader.dataset).__name__} is an IterableDataset, which only the first rank of each pipeline reads. "
            "If it divides its data by the rank and number of processes, most of it is never read: divide by "
            "trainer.strategy.distributed_sampler_kwargs['rank'] and ['num_replicas'] instead"
        )


def _empty(slot: _Slot) -> Tensor:
    return torch.empty(slot.shape, dtype=slot.dtype)
