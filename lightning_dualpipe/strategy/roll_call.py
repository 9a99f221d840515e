"""Which ranks are lost, said by those that notice: a run over several hosts has nobody else who could.

A rank that fails leaves a word in the store where all ranks met. One that has lost its connection to another
then waits a moment for the words of the rest, and adds to its error what it has found:

    rank 2 has left an error        that is the cause
    ranks 2 and 3 say nothing       they are lost: killed, or their host is down or cut off
    the store does not answer       this host is cut off from that of rank 0, or that one is down

It talks to the store over a connection of its own, in a thread of its own: an answer that never comes leaves
torch's store waiting until the kernel gives the connection up, a quarter of an hour later.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from lightning_dualpipe.strategy.failures import lost_a_peer

__all__ = ["RollCall", "what_is_known"]

_LISTEN_SECONDS = 4.0  # ranks notice within seconds of each other that another one is gone
_SPEAK_SECONDS = 1.0
_CONNECT_SECONDS = 2.0  # the thread should end before the process, which else ends by SIGABRT
_POLL_SECONDS = 0.05
_ALSO_LOST = "lost"


class RollCall:
    """Of the ranks of one attempt to train."""

    def __init__(self, rank: int, hosts: Sequence[str], name: str) -> None:
        self._rank, self._hosts, self._name = rank, hosts, name

    @classmethod
    def arrange(cls, rank: int, world: int) -> "RollCall | None":
        """All ranks of the default process group together; None on one host, where others see who has ended how."""
        places: list[tuple[str, str]] = [("", "")] * world
        dist.all_gather_object(places, (socket.gethostname(), uuid4().hex))
        hosts = [host for host, _ in places]
        return cls(rank, hosts, f"lightning_dualpipe/{places[0][1]}") if len(set(hosts)) > 1 else None

    def report(self, error: BaseException) -> None:
        """Leave a word for the others; to the error of a lost connection, add who is lost. Never raises."""
        lost = lost_a_peer(error)
        words: dict[int, str] | None = None

        def talk() -> None:
            nonlocal words
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection((address, port), _CONNECT_SECONDS).close()  # torch would fill a page with this
            store = dist.TCPStore(
                address, port, None, False, timedelta(seconds=_CONNECT_SECONDS), wait_for_workers=False
            )
            store.set(self._key(self._rank), _ALSO_LOST if lost else f"{type(error).__name__}: {error}")
            words = {}
            end = time.monotonic() + _LISTEN_SECONDS
            while lost and len(words) < len(self._hosts) and time.monotonic() < end:
                for rank in set(range(len(self._hosts))) - words.keys():
                    if store.check([self._key(rank)]):
                        words[rank] = store.get(self._key(rank)).decode()
                time.sleep(_POLL_SECONDS)

        _within(2 * _CONNECT_SECONDS + _LISTEN_SECONDS if lost else _SPEAK_SECONDS, talk)
        if lost:
            error.add_note(what_is_known(self._rank, self._hosts, words))

    def _key(self, rank: int) -> str:
        return f"{self._name}/{rank}"


def what_is_known(rank: int, hosts: Sequence[str], words: dict[int, str] | None) -> str:
    """For people.

    Args:
        rank: who says it.
        hosts: by rank.
        words: by rank what those have left that came to say something; None if the store does not answer.
    """
    begin = f"rank {rank} on {hosts[rank]} has lost its connection to another rank: "
    if words is None:
        return (
            f"{begin}{hosts[0]}, the host of rank 0, does not answer; it is down, or {hosts[rank]} is cut off from it"
        )
    causes = [f"rank {other} on {hosts[other]} failed: {word}" for other, word in words.items() if word != _ALSO_LOST]
    silent: dict[str, list[int]] = {}
    for other in sorted(set(range(len(hosts))) - words.keys() - {rank}):
        silent.setdefault(hosts[other], []).append(other)
    causes += [_of_the_silent(host, ranks, hosts) for host, ranks in silent.items()]
    return begin + ("; ".join(causes) or "all ranks have, so a link between them was interrupted, or all wait in vain")


def _of_the_silent(host: str, ranks: list[int], hosts: Sequence[str]) -> str:
    who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    if len(ranks) == list(hosts).count(host):
        return f"no word from {who}, all of {host}, which is down or cut off"
    return f"no word from {who} on {host}, killed or in a hang; the output there may tell"


def _within(seconds: float, talk: Callable[[], None]) -> None:
    def quietly() -> None:
        try:
            talk()
        except Exception:  # whoever is to hear of it is gone too
            return

    thread = threading.Thread(target=quietly, daemon=True, name="roll-call")
    thread.start()
    thread.join(seconds)
