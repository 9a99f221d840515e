"""Random states of all ranks, in a checkpoint and back: a model with dropout goes on as if it had not been stopped.

They belong to ranks, and so to one layout: under another one each rank goes on with what it was seeded with.
Set at the first training batch, because making the iterator of a DataLoader draws from them too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states

__all__ = ["collect_random_states", "set_random_states"]


def collect_random_states(group: dist.ProcessGroup | None) -> list[Any]:
    """On rank 0 those of every rank, in plain values. A collective."""
    mine = _collect_rng_states()
    if "numpy" in mine:
        name, keys, *rest = mine["numpy"]
        mine["numpy"] = (name, [int(key) for key in keys], *rest)
    if group is None:
        return [mine]
    here = dist.get_rank(group) == 0
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(mine, found if here else None, group=group, group_dst=0)
    return found if here else []


def set_random_states(states: Mapping[str, Any]) -> None:
    states = dict(states)
    if "numpy" in states:
        name, keys, *rest = states["numpy"]
        states["numpy"] = (name, np.array(keys, dtype=np.uint32), *rest)
    _set_rng_states(states)
