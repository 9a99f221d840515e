"""What a test may leave behind: nothing.

``Leaks()`` looks at this process before a test; ``found()`` looks again, names what is new, and
ends it, so that one careless test does not disturb the next. The forkserver of ``tests/ranks.py``
is meant to stay. Processes and sockets are read from /proc; elsewhere those two find nothing.
"""

import contextlib
import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# An environment variable that every descendant inherits, even one whose parent is gone.
SESSION_NAME, SESSION_ID = "DUALPIPE_TESTS", str(uuid.uuid4())
# Lightning and torch announce a run to their children in these; ours to put back, no test's fault.
SET_BY_RUNS = {
    *("GROUP_RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE"),
    *("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
}
# Set once, when a library is imported, or by pytest.
SET_BY_IMPORTS = (
    *("CUDA_", "KMP_", "NCCL_", "PYTEST_", "PYTORCH_", "TOKENIZERS_", "TORCHINDUCTOR_", "TORCH_NCCL_", "TRITON_"),
    "USE_LIBUV",
)
KEPT_FILES = ("matplotlib-", "pymp-", "torchinductor_")  # caches, and the forkserver's socket
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Leaks:
    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.threads = set(threading.enumerate())
        self.processes = _process_ids()
        self.sockets = _sockets()
        self.files = _temporary_files()

    def found(self) -> list[str]:
        """What is new, a line each; in its place afterwards, or gone."""
        _end_process_group()
        return [
            *self._modes(),
            *self._environment(),
            *self._handlers(),
            *self._processes(),  # before threads and sockets, which may belong to one
            *self._threads(),
            *self._sockets(),
            *self._files(),
        ]

    def _modes(self) -> Iterable[str]:
        torch = sys.modules.get("torch")
        if torch is None:
            return
        if torch.get_default_dtype() != torch.float32:
            yield f"the default dtype is {torch.get_default_dtype()}"
            torch.set_default_dtype(torch.float32)
        if not torch.is_grad_enabled():
            yield "gradients are disabled"
            torch.set_grad_enabled(True)

    def _environment(self) -> Iterable[str]:
        for name in self.environment.keys() | os.environ.keys():
            before, now = self.environment.get(name), os.environ.get(name)
            if before == now or name.startswith(SET_BY_IMPORTS):
                continue
            if name not in SET_BY_RUNS:
                yield f"environment variable {name} is {now!r}, was {before!r}"
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    def _handlers(self) -> Iterable[str]:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) != handler:
                yield f"handler of {number.name} is {signal.getsignal(number)}"
                signal.signal(number, handler)

    def _processes(self) -> Iterable[str]:
        for pid in _gone_within(5, lambda: _ours(_process_ids() - self.processes)):
            yield f"process {pid} runs: {_read(pid, 'cmdline').decode(errors='replace')}"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _threads(self) -> Iterable[str]:
        def new() -> list[threading.Thread]:
            # A thread of torch's that once ran Python; tqdm's one monitor; Lightning's watch over its
            # ranks, which looks every 5 s whether any is left.
            kinds = {"_DummyThread", "TMonitor", "_ChildProcessObserver"}
            now = set(threading.enumerate())
            return [thread for thread in now - self.threads if type(thread).__name__ not in kinds]

        yield from (f"thread runs: {thread}" for thread in _gone_within(2, new))

    def _sockets(self) -> Iterable[str]:
        if _sockets() - self.sockets:
            gc.collect()
        yield from (f"socket is open: {name}" for name in _gone_within(2, lambda: _sockets() - self.sockets))

    def _files(self) -> Iterable[str]:
        for path in _temporary_files() - self.files:
            yield f"temporary file {path}"
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _gone_within(seconds: float, find: Callable[[], Iterable[T]]) -> list[T]:
    """What is still found then: things end a moment after they were told to."""
    deadline = time.monotonic() + seconds
    while (found := list(find())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _end_process_group() -> None:
    """Lightning keeps the process group of a Trainer until the interpreter exits."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _process_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} if os.path.isdir("/proc") else set()


def _ours(pids: set[int]) -> Iterable[int]:
    """Those this test session started, whoever their parent is by now; not the ended, which have no environment."""
    # Neither has a public name; both exist once the first rank was forked.
    server, tracker = multiprocessing.forkserver._forkserver, multiprocessing.resource_tracker._resource_tracker
    meant_to_stay = {getattr(server, "_forkserver_pid", None), getattr(tracker, "_pid", None)}
    return [pid for pid in pids - meant_to_stay if f"{SESSION_NAME}={SESSION_ID}".encode() in _read(pid, "environ")]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ")
    except OSError:  # it ended, or is another user's
        return b""


def _sockets() -> set[str]:
    names = set()
    for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            names.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the one listdir used
            continue
    return {name for name in names if name.startswith("socket:")}


def _temporary_files() -> set[Path]:
    return {path for path in Path(tempfile.gettempdir()).iterdir() if not path.name.startswith(KEPT_FILES)}
