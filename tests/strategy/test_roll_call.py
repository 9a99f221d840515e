"""Ranks that lose others to another host say which, and why if it is known."""

import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.strategy import roll_call
from lightning_dualpipe.strategy.roll_call import RollCall, what_is_known
from tests.ranks import CONTEXT
from tests.strategy.test_launch import free_port

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


def test_rank_0_that_ends_with_its_store_is_told_from_a_host_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")  # where nobody listens
    error = connection_lost()
    RollCall(2, HOSTS, "run").report(error)
    assert error.__notes__ == [
        "rank 2 on b has lost its connection to another rank: a, the host of rank 0, answers, but the process by which "
        "ranks met has ended, which is rank 0 or torchrun's agent; the output there tells"
    ]


def test_a_host_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(socket, "create_connection", unreachable)
    error = connection_lost()
    RollCall(2, HOSTS, "run").report(error)
    assert error.__notes__ == [
        "rank 2 on b has lost its connection to another rank: a, the host of rank 0, does not answer; it is down, "
        "or b is cut off from it"
    ]


@pytest.mark.parametrize("leaves_a_word", [True, False])
def test_what_rank_0_said_outlives_it(tmp_path: Path, *, leaves_a_word: bool) -> None:
    """As under Slurm: the store where ranks met is in its process."""
    port = free_port()
    ranks = [CONTEXT.Process(target=meet, args=(rank, port, str(tmp_path), leaves_a_word)) for rank in range(2)]
    try:
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(60)
        note = (tmp_path / "note").read_text()
    finally:
        for each in ranks:
            each.kill()
            each.join()
    said = "rank 0 on host0 failed: ValueError: my own"
    ended = "rank 0 has ended without a word, and its host, host0, answers; the output there tells"
    assert note == f"rank 1 on host1 has lost its connection to another rank: {said if leaves_a_word else ended}"


def meet(rank: int, port: int, folder: str, leaves_a_word: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    socket.gethostname = lambda: f"host{rank}"
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    call = RollCall.arrange(rank, 2)
    assert call is not None
    if rank == 0:
        if leaves_a_word:
            call.report(ValueError("my own"))
        os._exit(1)
    try:
        dist.recv(torch.zeros(1), 0)
    except RuntimeError as error:
        call.report(error)
        (note,) = error.__notes__
        Path(folder, "note").write_text(note)
    os._exit(0)
