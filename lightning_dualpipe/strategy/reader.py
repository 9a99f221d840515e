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
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = ["PipelineReader"]


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
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        return (_StatefulPipelineReader if stateful else cls)(loader, group)

    def _read(self) -> Iterator[Any]:
        for batch in self._loader:
            tensors: list[Tensor] = []

            def take_out(tensor: Tensor, tensors: list[Tensor] = tensors) -> _Slot:
                tensors.append(tensor.detach().cpu().contiguous())
                return _Slot(tuple(tensor.shape), tensor.dtype)

            skeleton = apply_to_collection(batch, Tensor, take_out)
            self._broadcast_object((True, skeleton))
            for tensor in tensors:
                self._broadcast_tensor(tensor)
            yield batch
        self._broadcast_object((False, None))

    def _receive(self) -> Iterator[Any]:
        while True:
            more, skeleton = self._broadcast_object(None)
            if not more:
                return
            # slots are visited in the order in which they were taken out
            yield apply_to_collection(skeleton, _Slot, lambda slot: self._broadcast_tensor(_empty(slot)))

    def _broadcast_object(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def _broadcast_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.numel():
            dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor


class _StatefulPipelineReader(PipelineReader):
    """With the methods of its own by which Lightning recognises a loader that can go on where it stopped."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)


def _empty(slot: _Slot) -> Tensor:
    return torch.empty(slot.shape, dtype=slot.dtype)
