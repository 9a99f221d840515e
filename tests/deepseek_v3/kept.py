"""What is alive after a forward because backward will want it, whoever holds it and however."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_alive_after(run: Callable[[], Any]) -> int:
    """Of the memory that ``run`` allocates, what its result and its graph still hold."""
    with _Allocations() as allocations:
        result = run()
    alive = allocations.alive()
    del result
    return alive


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in given:  # no view, and not written in place
                storage = tensor.untyped_storage()
                self._made[_key(tensor)] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
