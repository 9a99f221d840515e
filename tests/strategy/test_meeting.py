"""Ranks that torchrun has started again meet each other, and not those that died."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_dualpipe.strategy.meeting import name_of_this_attempt, store_of_this_attempt

SOON = timedelta(seconds=20)


@pytest.fixture
def port() -> Iterator[int]:
    """Of torchrun's store, that it keeps from one attempt to the next."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def client(port: int) -> dist.Store:
    return dist.TCPStore("127.0.0.1", port, wait_for_workers=False)


def join(port: int, rank: int, timeout: timedelta = SOON) -> str:
    return name_of_this_attempt(client(port), rank, 3, timeout)


def attempt(port: int, ranks: list[int]) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        names = [pool.submit(join, port, rank) for rank in ranks]
        return [name.result() for name in names]


def test_each_attempt_has_a_name_of_its_own(port: int) -> None:
    first, second = attempt(port, [0, 1, 2]), attempt(port, [2, 1, 0])
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_what_a_dead_attempt_has_left_misleads_nobody(port: int) -> None:
    """It came so far that ranks 1 and 2 had asked, and rank 1 had its answer."""
    kept = client(port)
    kept.set("here/1", "dead1")
    kept.set("answer/1/dead1", "dead")
    kept.set("dead/1", "")
    kept.set("here/2", "dead2")
    names = attempt(port, [0, 1, 2])
    assert len(set(names)) == 1 and names[0] != "dead"


def test_who_has_not_come_is_named(port: int) -> None:
    said = ""
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(join, port, 1)
        try:
            join(port, 0, timedelta(seconds=0.5))
        except dist.DistStoreError as error:
            said = str(error)
        there.result()
    assert said == "ranks [2] have not come"


def test_elsewhere_the_store_is_new_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert store_of_this_attempt(0, 2, SOON) is None
