"""A run that went well ends well, also where a rank ends faster than gloo's threads."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

from lightning_dualpipe.strategy import parting

# One rank takes the result of a collective, and ends before a thread of gloo has had Python's lock to let go of the
# tensor. Without wait_for_threads_at_exit it is killed by SIGABRT: "terminate called without an active exception".
RANK = textwrap.dedent("""
    import atexit, sys, time, torch
    import torch.distributed as dist
    from lightning_dualpipe.strategy.parting import wait_for_threads_at_exit

    store, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    atexit._clear()  # what others would do there may give the lock away; weakref complains of it on stderr
    wait_for_threads_at_exit()
    dist.barrier()
    if rank == 0:
        dist.all_reduce(torch.ones(1))
        sys.stdin.read()  # the other one ends first
    else:
        sys.setswitchinterval(1000)
        dist.all_reduce(torch.ones(1), async_op=True)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            pass
""")


def test_a_rank_waits_for_gloo_to_let_go_of_tensors(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in reversed(started):
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
    finally:
        for process in started:
            process.kill()


def test_names_of_threads_may_be_no_text():
    named, stop = threading.Event(), threading.Event()

    def name_itself():
        Path("/proc/thread-self/comm").write_bytes("Überwachungsfäden".encode()[:15])  # as the kernel cuts it
        named.set()
        stop.wait()

    thread = threading.Thread(target=name_itself)
    thread.start()
    try:
        assert named.wait(60)
        parting._others_run()
    finally:
        stop.set()
        thread.join()


def test_a_thread_that_computes_for_ever_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(parting, "_PATIENCE_SECONDS", 0.2)
    stop = threading.Event()

    def compute():
        while not stop.is_set():
            pass

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert any(parting._others_run() for _ in range(100))
        begin = time.monotonic()
        parting._come_to_rest()
        assert time.monotonic() - begin < 60  # on a busy machine
    finally:
        stop.set()
        thread.join()
