"""Ranks that lose others to another host say which, and why if it is known."""

import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from lightning_dualpipe.strategy import roll_call
from lightning_dualpipe.strategy.roll_call import RollCall, what_is_known

HOSTS = ("a", "a", "b", "b")
LOST = "lost"
SAID = {
    "a host": ({0: LOST, 1: LOST}, "no word from ranks 2, 3, all of b, which is down or cut off"),
    "a rank": ({0: LOST, 1: LOST, 2: LOST}, "no word from rank 3 on b, killed or in a hang; the output there may tell"),
    "a rank of this host": ({0: LOST, 2: LOST, 3: LOST}, "no word from rank 1 on a, killed or in a hang; the output"),
    "an error": ({0: LOST, 1: LOST, 2: "ValueError: no", 3: LOST}, "rank 2 on b failed: ValueError: no"),
    "nobody": ({0: LOST, 1: LOST, 2: LOST, 3: LOST}, "all ranks have, so a link between them was interrupted"),
    "the store": (None, "a, the host of rank 0, does not answer; it is down, or a is cut off from it"),
}


@pytest.mark.parametrize("lost", SAID)
def test_what_is_lost_is_named(lost: str) -> None:
    words, expected = SAID[lost]
    said = what_is_known(0, HOSTS, words)
    assert said.startswith(f"rank 0 on a has lost its connection to another rank: {expected}")


def connection_lost() -> RuntimeError:
    return RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:5519")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one where all ranks have met."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(roll_call, "_LISTEN_SECONDS", 1.0)
    yield
    del store


@pytest.mark.usefixtures("store")
def test_ranks_hear_of_each_other() -> None:
    errors = {0: connection_lost(), 1: connection_lost(), 2: ValueError("no")}
    calls = [threading.Thread(target=RollCall(rank, HOSTS, "run").report, args=(errors[rank],)) for rank in errors]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    for rank in (0, 1):
        (note,) = errors[rank].__notes__
        assert note.startswith(f"rank {rank} on a has lost")
        assert "rank 2 on b failed: ValueError: no; no word from rank 3 on b" in note
    assert not hasattr(errors[2], "__notes__")


def test_a_store_that_is_gone_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    error = connection_lost()
    RollCall(2, HOSTS, "run").report(error)
    assert error.__notes__ == [
        "rank 2 on b has lost its connection to another rank: a, the host of rank 0, does not answer; it is down, "
        "or b is cut off from it"
    ]
