"""End a run in which nothing moves, and say who waits for whom.

    every rank      a thread looks whether the rank is at work (``strategy.progress``), and posts a beat
    stuck           for half the timeout: it also posts what it waits for (``strategy.waiting``), and reads what
                    the others post
    for all of it   verdict: 1. ranks that post nothing any more: stopped, or their host is gone; but not those that
                                others of their host see at work, in one long call that holds Python's lock
                             2. ranks that are stuck, but wait for nobody: in the data loader, say
                             3. all of them, in a circle
                    unless somebody is at work, who may be what the others wait for

The verdict is the same on all ranks. Each then writes what it waited for, reports the verdict as its failure
(``strategy.failures``), kills those of its host that are stopped, whom a signal to end would not reach, and ends.

Posts go through the store by which the ranks have met, over a connection of its own. It lives in the process of rank 0,
or under torchrun in that of its agent: where it does not answer, that is the verdict.
"""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_dualpipe.errors import TrainingError
from lightning_dualpipe.strategy.failures import LocalRun, report_failure, tell
from lightning_dualpipe.strategy.meeting import agent_keeps_the_store
from lightning_dualpipe.strategy.progress import Neighbours, Progress, is_stopped, start_of
from lightning_dualpipe.strategy.waiting import Waiting, waiting

__all__ = ["Post", "Watchdog", "verdict"]

_LOOKS = 10  # within a timeout
_SLOWEST_LOOK = 10.0  # seconds
_SILENT = 0.4  # of the timeout without a beat; ranks begin to read at half of it
_PARTING_SECONDS = 1.0  # for what was written, and for the others to come to their verdict
_FREED_SECONDS = 15.0  # for a main process to fail on its own when its ranks are gone
_SHOWN = 8  # ranks, by name
_POST_BYTES = 1024  # at most, and each rank reads those of all; the store's process sends them


@dataclass(frozen=True, slots=True)
class Post:
    """What a rank says of itself."""

    beat: int
    host: str
    process: int
    started: str
    stuck: bool = False
    left: bool = False
    what: str = ""
    ranks: tuple[int, ...] = ()
    busy: tuple[int, ...] = ()
    """Ranks of the same host that use a processor."""


class Watchdog:
    """Of the thread that makes it, from ``start`` to ``stop``, on every rank.

    Args:
        timeout: seconds in which nobody is at work.
    """

    def __init__(self, timeout: float, *, rank: int, world: int, device: torch.device) -> None:
        self._timeout, self._rank, self._world = timeout, rank, world
        self._pause = min(timeout / _LOOKS, _SLOWEST_LOOK)
        self._watched = threading.get_ident()
        self._watched_thread = threading.current_thread()
        has_store = rank == 0 and not agent_keeps_the_store()
        self._progress = Progress(device, overhead=_POST_BYTES * world**2 * has_store)
        self._neighbours = Neighbours()
        self._busy: tuple[int, ...] = ()
        self._looked = self._moved = time.monotonic()
        self._told_of_trouble = False
        self._board = _Board(rank, world, self._pause)
        self._beat = 0
        self._seen: dict[int, tuple[Post, float]] = {}  # by rank the last post, and when it was new
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hang-watchdog")

    def start(self, group: dist.ProcessGroup | None = None) -> None:
        """A collective of all ranks: each knows the processes of the others from the beginning."""
        first: list[Post] = [self._mine()] * self._world
        dist.all_gather_object(first, first[0], group=group)
        self._seen = {rank: (post, time.monotonic()) for rank, post in enumerate(first)}
        self._board.start()
        self._thread.start()

    def stop(self) -> None:
        """The rank ends, or goes on with what others have no part in."""
        self._stopped.set()
        self._board.stop(self._mine(left=True))

    def _watch(self) -> None:
        self._looked = self._moved = time.monotonic()
        while not self._stopped.wait(self._pause):
            try:
                self._look(time.monotonic())
            except Exception as trouble:  # a rank that does not post would be taken for a stopped one
                if not self._told_of_trouble:
                    tell(f"rank {self._rank} cannot see whether it is at work, so it counts as if: {trouble!r}")
                self._told_of_trouble = True
                self._looked = self._moved = time.monotonic()
                self._board.post(self._mine())
                self._board.read(everything=False)

    def _look(self, now: float) -> None:
        here = self._ranks_here()
        self._progress.others = here.values()
        busy = self._neighbours.busy(here.values())
        self._busy = tuple(rank for rank, process in here.items() if process in busy)
        # one that was stopped itself, with all others perhaps, has nothing to say of the time between
        if self._progress.made() or now - self._looked > self._timeout * _SILENT:
            self._moved = now
        self._looked, stuck = now, now - self._moved
        half = stuck > self._timeout / 2
        self._board.post(self._mine(stuck=half))
        self._board.read(everything=half)
        self._read(now)
        if stuck > self._timeout and (found := self._verdict(now)) and not self._stopped.is_set():
            self._end(found, stuck)

    def _mine(self, *, stuck: bool = False, left: bool = False) -> Post:
        self._beat += 1
        found, process = Waiting(""), os.getpid()
        if stuck:  # only then: who looks at variables of a frame keeps them alive until it ends
            found = waiting(sys._current_frames().get(self._watched))
        host, started = socket.gethostname(), start_of(process)
        return Post(self._beat, host, process, started, stuck, left, found.what, found.ranks, self._busy)

    def _read(self, now: float) -> None:
        for rank, post in self._board.posts.items():
            known = self._seen.get(rank)
            if known is None or known[0].beat != post.beat:
                self._seen[rank] = (post, now)

    def _ranks_here(self) -> dict[int, int]:
        """With their processes."""
        return {rank: post.process for rank, (post, _) in self._seen.items() if self._is_here(post)}

    def _is_here(self, post: Post) -> bool:
        return post.host == socket.gethostname() and post.started == start_of(post.process) != ""

    def _verdict(self, now: float) -> str | None:
        if self._store_is_silent(now):
            return (
                "the store by which ranks find each other does not answer: the process it is in (that of rank 0, or "
                "torchrun's agent on the first node) is stopped, or its host is gone"
            )
        silent, unheard = self._silent(now)
        posts = {
            rank: replace(post, stuck=post.stuck and rank not in unheard) for rank, (post, _) in self._seen.items()
        }
        return verdict(posts, silent)

    def _store_is_silent(self, now: float) -> bool:
        return self._board.silent_for(now) > self._timeout * _SILENT

    def _silent(self, now: float) -> tuple[set[int], set[int]]:
        """Ranks that have stopped posting, and those that have and are seen at work all the same."""
        late = {rank for rank, (_, when) in self._seen.items() if now - when > self._timeout * _SILENT} - {self._rank}
        busy = {each for rank, (post, _) in self._seen.items() if rank not in late for each in post.busy}
        silent = {rank for rank in late if not self._seen[rank][0].left}
        return silent - busy - {*self._busy}, silent & (busy | {*self._busy})

    def _end(self, found: str, stuck: float) -> None:
        mine = self._mine(stuck=True)
        whom = f" ({_ranks(mine.ranks)})" if mine.ranks else ""
        does = "waits" if mine.ranks else "is"
        tell(f"rank {self._rank} {does} {mine.what}{whom}, for {stuck:.0f} s")
        report_failure(TrainingError(found), rank=self._rank)
        run = LocalRun.joined()
        time.sleep(_PARTING_SECONDS)
        self._kill_the_silent_ones(time.monotonic())
        if run is not None and run.main != os.getpid():
            time.sleep(_PARTING_SECONDS)  # the last word has the main process, or if that is gone who watches it
            os._exit(1)
        if run is not None:  # this is the main process: it fails as usual when its ranks are gone
            self._watched_thread.join(_FREED_SECONDS)
            if self._stopped.is_set():
                return
            shutil.rmtree(run.folder, ignore_errors=True)  # it waits for something else
        tell(found)
        os._exit(1)

    def _kill_the_silent_ones(self, now: float) -> None:
        """On this host. Without the store all are silent, also those that are about to end by themselves."""
        all_are = self._store_is_silent(now)
        for rank in self._silent(now)[0]:
            post, _ = self._seen[rank]
            if self._is_here(post) and (not all_are or is_stopped(post.process)):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(post.process, signal.SIGKILL)


def verdict(posts: Mapping[int, Post], silent: set[int]) -> str | None:
    """Who holds up the others, from the last post of each rank; None if it may be somebody who is at work.

    Args:
        silent: ranks that have stopped posting.
    """
    if silent:
        return (
            f"{_ranks(silent, posts)} {'does' if len(silent) == 1 else 'do'} not answer: stopped, or "
            f"{'its host is' if len(silent) == 1 else 'their hosts are'} gone{_who_waits(posts, silent)}"
        )
    there = {rank: post for rank, post in posts.items() if not post.left}
    if not all(post.stuck for post in there.values()):
        return None
    idle = {rank: post for rank, post in there.items() if not post.ranks}
    if idle:
        stuck = "; ".join(f"{_ranks({rank}, posts)} is {post.what}" for rank, post in sorted(idle.items()))
        return f"{stuck}: nothing moves there{_who_waits(posts, set(idle))}"
    left = {rank for rank, post in posts.items() if post.left}
    if left:
        return f"{_ranks(left, posts)} {'has' if len(left) == 1 else 'have'} left{_who_waits(posts, left)}"
    return "all ranks wait for each other: " + "; ".join(
        f"rank {rank} {post.what} ({_ranks(post.ranks)})" for rank, post in sorted(there.items())
    )


def _who_waits(posts: Mapping[int, Post], culprits: set[int]) -> str:
    """A sentence. Those who wait for nobody but them come first: they are the next in the chain."""
    waiters = sorted(
        (len(set(post.ranks) - culprits), rank)
        for rank, post in posts.items()
        if rank not in culprits and culprits & set(post.ranks)
    )
    if not waiters:
        return ". The others wait" if posts.keys() - culprits else ""
    rank = waiters[0][1]
    return f". Rank {rank} waits for it {posts[rank].what}"


def _ranks(ranks: "set[int] | tuple[int, ...]", posts: Mapping[int, Post] | None = None) -> str:
    shown = []
    for rank in sorted(ranks)[:_SHOWN]:
        post = posts.get(rank) if posts is not None else None
        shown.append(f"{rank} ({post.host}, process {post.process})" if post is not None else str(rank))
    more = [f"and {len(ranks) - _SHOWN} more"] if len(ranks) > _SHOWN else []
    return f"rank{'s' * (len(ranks) > 1)} {', '.join([*shown, *more])}"


class _Board:
    """Talks to the store in a thread of its own, because a store that is stopped does not come back."""

    def __init__(self, rank: int, world: int, pause: float) -> None:
        self.posts: Mapping[int, Post] = {}
        """By rank, as they were last read."""
        self._rank, self._world = rank, world
        self._store = dist.PrefixStore("hang-watchdog", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=max(4 * pause, 1.0)))
        self._answered = time.monotonic()
        self._post: Post | None = None
        self._everything = True
        self._wake, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True, name="hang-watchdog-store")

    def start(self) -> None:
        self._thread.start()

    def post(self, post: Post) -> None:
        self._post = post

    def read(self, *, everything: bool) -> None:
        self._everything = everything
        self._wake.set()

    def stop(self, last: Post) -> None:
        self._post = last
        self._done.set()
        self._wake.set()
        self._thread.join(_PARTING_SECONDS)

    def silent_for(self, now: float) -> float:
        return now - self._answered

    def _talk(self) -> None:
        while not self._done.is_set():
            self._wake.wait()
            self._wake.clear()
            with suppress(dist.DistError, RuntimeError):
                self._exchange()

    def _exchange(self) -> None:
        if self._post is not None:
            self._store.set(str(self._rank), json.dumps(asdict(self._post)))
        wanted = range(self._world) if self._everything else (self._rank,)
        keys = [str(rank) for rank in wanted if self._store.check([str(rank)])]
        found = [json.loads(value) for value in self._store.multi_get(keys)] if keys else []
        self._answered = time.monotonic()
        read = {
            int(key): Post(**{**post, "ranks": tuple(post["ranks"]), "busy": tuple(post["busy"])})
            for key, post in zip(keys, found, strict=True)
        }
        self.posts = {**self.posts, **read}
