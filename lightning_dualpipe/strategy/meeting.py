"""Where the ranks of this attempt meet, when torchrun has started them again.

torchrun keeps its store from one attempt to the next, and in it lie the addresses of ranks that are dead, where
gloo and NCCL would look for those of now, and wait for ever. So each attempt keeps what it writes under a name of
its own, which rank 0 draws. The number of restarts in the environment is no such name: the torchruns of several
hosts each count for themselves, and only what their own ranks did.

    rank r                          rank 0
    here/r = a number it draws ───►
                               ◄─── answer/r/that number = the name         a later r asks anew, and gets it too
    name/r                     ───►                                         done when all of them have it
"""

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

__all__ = ["address_of_the_store", "agent_keeps_the_store", "store_of_this_attempt"]

_POLL_SECONDS = 0.02
_PREFIX = "lightning_dualpipe"


def store_of_this_attempt(rank: int, world: int, timeout: timedelta) -> dist.Store | None:
    """For ``init_process_group``; None where nothing is kept between attempts. All ranks call this together.

    Raises:
        DistStoreError: some rank has not come within ``timeout``.
    """
    if not agent_keeps_the_store():
        return None
    kept = dist.TCPStore(*address_of_the_store(), world, False, timeout)
    return dist.PrefixStore(name_of_this_attempt(dist.PrefixStore(_PREFIX, kept), rank, world, timeout), kept)


def agent_keeps_the_store() -> bool:
    """Whether it lives in the process of torchrun's agent; else it does in that of rank 0, and ends with it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def address_of_the_store() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def name_of_this_attempt(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """The same on all ranks, and another in every attempt, whatever earlier ones have left in ``store``."""
    if rank == 0:
        return _answer_all(store, world, time.monotonic() + timeout.total_seconds())
    number = uuid4().hex
    store.set(f"here/{rank}", number)
    name = store.get(f"answer/{rank}/{number}").decode()
    store.set(f"{name}/{rank}", "")
    return name


def _answer_all(store: dist.Store, world: int, deadline: float) -> str:
    name, answered = uuid4().hex, dict.fromkeys(range(1, world), b"")
    while not store.check([f"{name}/{rank}" for rank in answered]):
        for rank in answered:
            # of a rank of now, or of one that is dead: then its successor will write over it
            if store.check([f"here/{rank}"]) and (number := store.get(f"here/{rank}")) != answered[rank]:
                store.set(f"answer/{rank}/{number.decode()}", name)
                answered[rank] = number
        if time.monotonic() > deadline:
            missing = [rank for rank in answered if not store.check([f"{name}/{rank}"])]
            raise dist.DistStoreError(f"ranks {missing} have not come")
        time.sleep(_POLL_SECONDS)
    return name
