"""When nothing moves the run ends, with an exit code, and the message names the rank that holds up the others.

The programs are real ones, as ``devices=N`` and torchrun start them; a fault stops one rank, or lets it hang. That
costs minutes, so what runs always are ranks that do nothing but meet.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe import ConfigurationError, DualPipeStrategy
from lightning_dualpipe.checkpoint.writing import is_writing, writing
from lightning_dualpipe.strategy.progress import _MOVED, Progress, _bytes_of
from lightning_dualpipe.strategy.watchdog import Post, Watchdog, verdict
from tests.checkpoint.damage import write
from tests.marks import needs_patience
from tests.ranks import CONTEXT
from tests.strategy.programs import SCRIPT, TO_END, Program, run_together
from tests.strategy.test_failures import TORCHRUN, check_gone

TIMEOUT = 5
WATCHED = ("--strategy", json.dumps({"schedule": "1f1b", "hang_timeout": TIMEOUT}))
THREE = ("--devices", "3", *WATCHED)


def hanging(command: tuple[str, ...], place: str, rank: int | None, what: str) -> Program:
    return Program([command], {"place": place, "rank": rank, "what": what})


@needs_patience
@pytest.mark.slow
def test_a_rank_that_holds_up_the_others_is_named_and_all_end(tmp_path):
    ended = run_together(
        {
            "stopped": hanging((*SCRIPT, *THREE), "training_step", 1, "stop"),
            "main stopped": hanging((*SCRIPT, *WATCHED), "training_step", 0, "stop"),
            "reads for ever": hanging((*SCRIPT, *WATCHED), "dataset", 0, "hang"),
            "works": hanging((*SCRIPT, *WATCHED), "training_step", 1, "work"),
        },
        tmp_path,
    )
    stopped = ended["stopped"]
    check_gone(stopped)
    assert stopped.seconds < TIMEOUT + 15
    assert "rank 1 (" in stopped.last_words and "does not answer: stopped" in stopped.last_words
    assert "rank 0 waits in 0B0 for the gradients of microbatch 0 from stage 1 (rank 1), for" in stopped.error
    assert "Traceback" not in stopped.error

    assert all(code < 0 or code == 1 for code in ended["main stopped"].codes)
    assert 0 < ended["main stopped"].seconds < TO_END
    assert "(that of rank 0, or torchrun's agent" in ended["main stopped"].error

    check_gone(ended["reads for ever"])
    assert "is in the data loader: hang (strategy/faults.py:" in ended["reads for ever"].last_words
    assert "Rank 1 waits for it in broadcast_object_list, called by _broadcast_object" in ended["reads for ever"].error

    assert ended["works"].codes == [0]  # for longer than the timeout
    assert len(ended["works"].losses) == 8


@needs_patience
@pytest.mark.slow
def test_torchrun_does_not_wait_for_a_stopped_rank(tmp_path):
    (ended,) = run_together({"torchrun": hanging((*TORCHRUN, *WATCHED), "training_step", 1, "stop")}, tmp_path).values()
    assert ended.codes == [1]
    assert 0 < ended.seconds < TO_END
    assert ended.left_behind == []
    assert "does not answer: stopped" in ended.error.rpartition("Root Cause")[2]


# ---- ranks that only meet -------------------------------------------------------------------------

SHORT = 4.0  # seconds; less would take a busy machine for a stopped rank


def meet(rank: int, folder: str, fault: Callable[[], None]) -> None:
    """Five times; the second rank has a fault on the way to the fourth."""
    with open(f"{folder}/said-{rank}", "w") as said:
        sys.stderr = sys.__stderr__ = said
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3, timeout=timedelta(seconds=60)
        )
        watchdog = Watchdog(SHORT, rank=rank, world=3, device=torch.device("cpu"))
        watchdog.start()
        for step in range(5):
            if (rank, step) == (1, 3):
                fault()
            dist.all_reduce(torch.zeros(()))
        watchdog.stop()
        dist.destroy_process_group()


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_here() -> None:
    time.sleep(600)


def work_here() -> None:
    until = time.monotonic() + 1.25 * SHORT
    while time.monotonic() < until:
        pass


def hold_pythons_lock_here() -> None:
    """In one call, as an extension that computes in C without giving it up; no other thread runs meanwhile."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    work_here()
    sys.setswitchinterval(usual)


def write_here() -> None:
    """To a disk that takes its time."""
    with writing():
        time.sleep(1.25 * SHORT)


FAULTS = {  # with how the ranks end, and what is said of the second
    stop_here: ([1, -signal.SIGKILL, 1], "does not answer: stopped, or its host is gone"),
    sleep_here: ([1, 1, 1], "is in sleep_here (strategy/test_watchdog.py:"),
    work_here: ([0, 0, 0], None),
    hold_pythons_lock_here: ([0, 0, 0], None),
    write_here: ([0, 0, 0], None),
}


def test_ranks_that_wait_in_vain_end_and_name_the_one_they_wait_for(tmp_path):
    worlds = {}
    for fault in FAULTS:
        folder = tmp_path / fault.__name__
        folder.mkdir()
        worlds[fault] = [CONTEXT.Process(target=meet, args=(rank, str(folder), fault)) for rank in range(3)]
    ranks = [each for world in worlds.values() for each in world]
    try:
        for each in ranks:
            each.start()
        deadline = time.monotonic() + 60
        for each in ranks:
            each.join(max(0.0, deadline - time.monotonic()))
        for fault, (ends, what) in FAULTS.items():
            assert [each.exitcode for each in worlds[fault]] == ends
            said = "".join(Path(f"{tmp_path}/{fault.__name__}/said-{rank}").read_text() for rank in range(3))
            if what is None:
                assert said == ""
                continue
            found = f"lightning-dualpipe: rank 1 ({os.uname().nodename}, process {worlds[fault][1].pid}) {what}"
            assert found in said
            assert " Rank 0 waits for it in all_reduce, called by meet (strategy/test_watchdog.py:" in said
            assert "lightning-dualpipe: rank 0 waits in all_reduce, called by meet (" in said
    finally:
        for each in ranks:
            each.kill()
            each.join()


# ---- the verdict, without processes ---------------------------------------------------------------


def post(**options: object) -> Post:
    return Post(**{"beat": 9, "host": "a", "process": 70, "started": "1", "stuck": True, **options})  # type: ignore


def stuck_on(*ranks: int) -> Post:
    return post(what="in barrier", ranks=ranks)


VERDICTS: Mapping[str, tuple[dict[int, Post], set[int], str | None]] = {
    "a stopped rank": (
        {0: stuck_on(1), 1: post(what=""), 2: stuck_on(0)},
        {1},
        "rank 1 (a, process 70) does not answer: stopped, or its host is gone. Rank 0 waits for it in barrier",
    ),
    "one that never came": (
        {0: stuck_on(1)},
        {1},
        "rank 1 does not answer: stopped, or its host is gone. Rank 0 waits",
    ),
    "two hosts": ({0: stuck_on(1, 2)}, {1, 2}, "ranks 1, 2 do not answer: stopped, or their hosts are gone. Rank 0"),
    "somebody works": ({0: stuck_on(1), 1: post(stuck=False)}, set(), None),
    "somebody works, but another is gone": ({0: stuck_on(1), 1: post(stuck=False)}, {2}, "rank 2 does not answer"),
    "one waits for nobody": (
        {0: stuck_on(1), 1: post(what="in the data loader: read (a.py:1)")},
        set(),
        "rank 1 (a, process 70) is in the data loader: read (a.py:1): nothing moves there. Rank 0 waits for it in",
    ),
    "one has left": (
        {0: stuck_on(1), 1: post(left=True, stuck=False)},
        set(),
        "rank 1 (a, process 70) has left. Rank 0",
    ),
    "all are stopped": (
        {0: stuck_on(1), 1: stuck_on(0)},
        {0, 1},
        "ranks 0 (a, process 70), 1 (a, process 70) do not answer: stopped, or their hosts are gone",
    ),
    "in a circle": (
        {0: stuck_on(1), 1: stuck_on(0)},
        set(),
        "all ranks wait for each other: rank 0 in barrier (rank 1); rank 1 in barrier (rank 0)",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_names_who_holds_up_the_others(case):
    posts, silent, expected = VERDICTS[case]
    found = verdict(posts, silent)
    assert found == expected if expected is None else found.startswith(expected)
    assert not silent >= posts.keys() or found == expected, "nobody is left to wait"


READER = """
import time
file = open("/dev/zero", "rb", buffering=0)
while file.read(2**16):
    time.sleep(0.05)
"""


def test_a_rank_whose_child_reads_is_at_work():
    """Without much of a processor, as workers that fetch data from far away do."""
    child = subprocess.Popen([sys.executable, "-S", "-c", READER])
    try:
        progress = Progress(torch.device("cpu"))
        found = []
        for _ in range(4):
            time.sleep(0.4)
            found.append(progress.made())
        assert all(found[1:])
    finally:
        child.kill()
        child.wait()
    progress.made()
    time.sleep(0.4)
    assert not progress.made()


def test_a_rank_that_brings_a_checkpoint_to_the_disk_is_at_work(monkeypatch, tmp_path):
    """Every file of it: one call may take minutes in which nothing can be seen to move."""
    at_work = []
    monkeypatch.setattr(os, "fsync", lambda _: at_work.append(is_writing()))
    write(0, str(tmp_path / "step=1.ckpt"), step=1)
    assert len(at_work) > 3 and all(at_work)
    assert not is_writing()


def test_a_device_that_cannot_be_asked_counts_as_moving(monkeypatch):
    """While a CUDA graph is captured, say; and the question is asked again."""

    class Event:
        def record(self, _: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: None)
    progress = Progress(torch.device("cuda", 0))
    assert progress._queue_moves() and progress._queue_moves()


def test_what_the_store_sends_to_ranks_that_are_stuck_is_no_work():
    """With 16 ranks that read each other's posts it is more than what counts as work."""
    with dist_of_one():
        watchdog = Watchdog(SHORT, rank=0, world=16, device=torch.device("cpu"))
        store = dist.distributed_c10d._get_default_store().clone()
        keys = [str(rank) for rank in range(16)]
        for key in keys:
            store.set(key, "x" * 512)
        watchdog._progress.made()
        time.sleep(0.4)
        assert not watchdog._progress.made()
        moved = _bytes_of(os.getpid())
        for _ in keys:
            store.multi_get(keys)
        assert _bytes_of(os.getpid()) - moved > _MOVED
        watchdog._progress._when -= 60  # whatever that took of the processor
        assert not watchdog._progress.made()


@contextmanager
def dist_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_watchdog_that_cannot_look_says_so_once_and_goes_on_posting(monkeypatch, capfd):
    def fail(_: Progress) -> bool:
        raise OSError("no /proc here")

    monkeypatch.setattr(Progress, "made", fail)
    with dist_of_one():
        watchdog = Watchdog(1.0, rank=0, world=1, device=torch.device("cpu"))
        watchdog.start()
        time.sleep(0.8)
        assert watchdog._thread.is_alive()
        assert watchdog._board.posts[0].beat > 3 and not watchdog._board.posts[0].stuck
        watchdog.stop()
    assert capfd.readouterr().err.count("cannot see whether it is at work") == 1


def test_a_timeout_that_cannot_be_is_refused():
    with pytest.raises(ConfigurationError, match="hang_timeout=0 must be a number of seconds, at least 5, or None"):
        DualPipeStrategy(hang_timeout=0)
    with pytest.raises(ConfigurationError, match=r"hang_timeout=60 would never be reached: .*timeout=0:00:30"):
        DualPipeStrategy(hang_timeout=60, timeout=timedelta(seconds=30))
