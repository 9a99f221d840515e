"""Random states of all ranks, in a checkpoint and back: a model with dropout goes on as if it had not been stopped.

They belong to ranks, and so to one layout: under another one each rank goes on with what it was seeded with.
Set at the first training batch, because making the iterator of a DataLoader draws from them too.

A rank's are one line of JSON. As they come they are 1250 numbers, each of which costs a microsecond to read without
running code: of 2048 ranks seconds, and rank 0 reads what it saves, while training waits.
"""

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states

__all__ = ["collect_random_states", "set_random_states"]


def collect_random_states(group: dist.ProcessGroup | None) -> list[str]:
    """On rank 0 those of every rank. A collective."""
    mine = json.dumps(_collect_rng_states(), default=_plain)
    if group is None:
        return [mine]
    here = dist.get_rank(group) == 0
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(mine, found if here else None, group=group, group_dst=0)
    return found if here else []


def set_random_states(line: str) -> None:
    states = json.loads(line)
    states["torch"] = _tensor(states["torch"])
    states["torch.cuda"] = [_tensor(each) for each in states["torch.cuda"]]
    if "numpy" in states:
        name, keys, *rest = states["numpy"]
        states["numpy"] = (name, np.array(keys, dtype=np.uint32), *rest)
    _set_rng_states(states)


def _plain(state: torch.Tensor | np.ndarray) -> str | list[int]:
    """Bytes of torch; numbers of numpy."""
    return state.numpy().tobytes().hex() if isinstance(state, torch.Tensor) else state.tolist()


def _tensor(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
