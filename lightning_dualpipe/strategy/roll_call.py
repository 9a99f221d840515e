"""Which ranks are lost, said by those that notice: a run over several hosts has nobody else who could.

A rank that fails leaves a word in the store where all ranks met. One that has lost its connection to another
then waits a moment for the words of the rest, and adds to its error what it has found:

    rank 2 has left an error        that is the cause
    ranks 2 and 3 say nothing       they are lost: killed, or their host is down or cut off
    the store refuses               its process has ended, that of rank 0 or torchrun's agent
    the store does not answer       this host is cut off from that of rank 0, or that one is down

Without torchrun that store ends with rank 0, whose word nobody would read: others notice when it is gone. So there the
first rank of another host has a second one, and whatever is said is said in both.

It talks to a store over a connection of its own, in a thread of its own: an answer that never comes leaves
torch's store waiting until the kernel gives the connection up, a quarter of an hour later.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from uuid import uuid4

import torch.distributed as dist

from lightning_dualpipe.strategy.failures import lost_a_peer
from lightning_dualpipe.strategy.meeting import address_of_the_store, agent_keeps_the_store

__all__ = ["RollCall", "what_is_known"]

_LISTEN_SECONDS = 4.0  # ranks notice within seconds of each other that another one is gone
_SPEAK_SECONDS = 1.0
_CONNECT_SECONDS = 2.0  # the thread should end before the process, which else ends by SIGABRT
_POLL_SECONDS = 0.05
_ALSO_LOST = "lost"


@dataclass
class _Heard:
    """In one of the stores. ``words`` by rank; None if it does not answer."""

    words: dict[int, str] | None = None
    refused: bool = False


class RollCall:
    """Of the ranks of one attempt to train."""

    def __init__(self, rank: int, hosts: Sequence[str], name: str, second: tuple[str, int] | None = None) -> None:
        self._rank, self._hosts, self._name, self._second = rank, hosts, name, second
        self._kept: dist.TCPStore | None = None

    @classmethod
    def arrange(cls, rank: int, world: int) -> "RollCall | None":
        """All ranks of the default process group together; None on one host, where others see who has ended how."""
        places: list[tuple[str, str]] = [("", "")] * world
        dist.all_gather_object(places, (socket.gethostname(), uuid4().hex))
        hosts = [host for host, _ in places]
        if len(set(hosts)) == 1:
            return None
        call = cls(rank, hosts, f"lightning_dualpipe/{places[0][1]}")
        if not agent_keeps_the_store():
            call._open_a_second_store(next(other for other in range(world) if hosts[other] != hosts[0]))
        return call

    def _open_a_second_store(self, keeper: int) -> None:
        """In the process of ``keeper``, at the address that reaches rank 0 from there. All ranks together."""
        if self._rank == keeper:
            first = address_of_the_store()
            with suppress(OSError, RuntimeError), socket.create_connection(first, _CONNECT_SECONDS) as met:
                address = met.getsockname()[0]
                self._kept = dist.TCPStore(address, 0, None, True, wait_for_workers=False)
                self._second = (address, self._kept.port)
        told: list[tuple[str, int] | None] = [self._second]
        dist.broadcast_object_list(told, src=keeper)
        self._second = told[0]

    def report(self, error: BaseException) -> None:
        """Leave a word for the others; to the error of a lost connection, add who is lost. Never raises."""
        lost = lost_a_peer(error)
        word = _ALSO_LOST if lost else f"{type(error).__name__}: {error}"
        stores = [None, self._second] if self._second else [None]
        heard = [_Heard() for _ in stores]
        _within(
            2 * _CONNECT_SECONDS + _LISTEN_SECONDS if lost else _SPEAK_SECONDS,
            [partial(self._talk, store, word, into) for store, into in zip(stores, heard, strict=True)],
        )
        if lost:
            answers = [each.words for each in heard if each.words is not None]
            words = {rank: said for each in answers for rank, said in each.items()} if answers else None
            error.add_note(what_is_known(self._rank, self._hosts, words, refused=heard[0].refused))

    def _talk(self, place: tuple[str, int] | None, word: str, heard: "_Heard") -> None:
        """In the store that is there; None: where all ranks met."""
        address, port = place or address_of_the_store()
        try:
            socket.create_connection((address, port), _CONNECT_SECONDS).close()  # torch would fill a page with this
        except ConnectionRefusedError:
            heard.refused = True
            return
        store = dist.TCPStore(address, port, None, False, timedelta(seconds=_CONNECT_SECONDS), wait_for_workers=False)
        store.set(self._key(self._rank), word)
        words = heard.words = {}
        end = time.monotonic() + _LISTEN_SECONDS
        while word == _ALSO_LOST and len(words) < len(self._hosts) and time.monotonic() < end:
            for rank in set(range(len(self._hosts))) - words.keys():
                if store.check([self._key(rank)]):
                    words[rank] = store.get(self._key(rank)).decode()
            time.sleep(_POLL_SECONDS)

    def _key(self, rank: int) -> str:
        return f"{self._name}/{rank}"


def what_is_known(rank: int, hosts: Sequence[str], words: dict[int, str] | None, *, refused: bool = False) -> str:
    """For people.

    Args:
        rank: who says it.
        hosts: by rank.
        words: by rank what those have left that came to say something; None if no store answers.
        refused: the host of rank 0 answers, but nobody has that store any more.
    """
    begin = f"rank {rank} on {hosts[rank]} has lost its connection to another rank: "
    if words is None and refused:
        return (
            f"{begin}{hosts[0]}, the host of rank 0, answers, but the process by which ranks met has ended, which is "
            "rank 0 or torchrun's agent; the output there tells"
        )
    if words is None:
        return (
            f"{begin}{hosts[0]}, the host of rank 0, does not answer; it is down, or {hosts[rank]} is cut off from it"
        )
    causes = [f"rank {other} on {hosts[other]} failed: {word}" for other, word in words.items() if word != _ALSO_LOST]
    missing = set(range(len(hosts))) - words.keys() - {rank}
    if refused and 0 in missing:
        causes.append(f"rank 0 has ended without a word, and its host, {hosts[0]}, answers; the output there tells")
        missing = {other for other in missing if hosts[other] != hosts[0]}  # they end with it
    silent: dict[str, list[int]] = {}
    for other in sorted(missing):
        silent.setdefault(hosts[other], []).append(other)
    causes += [_of_the_silent(host, ranks, hosts) for host, ranks in silent.items()]
    return begin + ("; ".join(causes) or "all ranks have, so a link between them was interrupted, or all wait in vain")


def _of_the_silent(host: str, ranks: list[int], hosts: Sequence[str]) -> str:
    who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    if len(ranks) == list(hosts).count(host):
        return f"no word from {who}, all of {host}, which is down or cut off"
    return f"no word from {who} on {host}, killed or in a hang; the output there may tell"


def _within(seconds: float, talks: Iterable[Callable[[], None]]) -> None:
    """At the same time."""
    threads = [threading.Thread(target=_quietly, args=(talk,), daemon=True, name="roll-call") for talk in talks]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def _quietly(talk: Callable[[], None]) -> None:
    with suppress(Exception):  # whoever is to hear of it is gone too
        talk()
