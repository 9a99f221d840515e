"""Start the ranks of one node, and see to it that none outlives the others.

    main process (local rank 0) ──starts──► ranks 1..n-1       the same script, as Lightning does
        └─ observer thread: a rank that ended badly ends the run: a grace period in which the others
           fail on their own and say why, then they are killed, and the first cause is printed
    every other rank
        └─ watches its parent: if the main process is gone, it goes too

Under torchrun and SLURM those start and stop the ranks; only reports are written there.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_dualpipe.strategy.failures import FOLDER_VARIABLE, first_cause, read_reports

__all__ = ["PipelineLauncher", "watch_parent"]

_PARENT = "LIGHTNING_DUALPIPE_PARENT"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0


class PipelineLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher by subprocesses, with an end that tells the reason."""

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._observer: _Observer | None = None

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally and not self.procs:
            folder = Path(tempfile.mkdtemp(prefix="lightning-dualpipe-"))
            os.environ[FOLDER_VARIABLE], os.environ[_PARENT] = str(folder), str(os.getpid())
            self._call_children_scripts()
            self._observer = _Observer(self.procs, folder)
            self._observer.start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class _Observer(threading.Thread):
    """Ends the run when a rank has failed. Whoever comes first, this thread or the exit of the main process, tells."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
        super().__init__(daemon=True, name="rank-observer")
        self._processes = processes
        self._folder = folder
        self._died: dict[int, int] = {}
        self._told = threading.Lock()
        atexit.register(self._at_exit)

    @override
    def run(self) -> None:
        while not self._failed():
            if all(process.returncode == 0 for process in self._processes):
                return
            time.sleep(_POLL_SECONDS)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and self._alive():
            self._failed()
            time.sleep(_POLL_SECONDS)
        time.sleep(_POLL_SECONDS)  # the main process may be on its way out: its own traceback comes first
        self._end()
        if (self._folder / "rank-0.json").exists():
            return  # it failed by itself; its exit tells
        if self._tell():  # it hangs in a collective that will never complete
            os._exit(1)

    def _failed(self) -> bool:
        """Whether any rank has failed; remembers how those that ended did."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll():
                self._died.setdefault(rank, process.returncode)
        return bool(self._died) or any(self._folder.glob("rank-*.json"))

    def _alive(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _tell(self) -> bool:
        """Print the first cause, once; whether there was one."""
        if not self._told.acquire(blocking=False):
            return False
        cause = first_cause(read_reports(self._folder), self._died) if self._folder.exists() else None
        shutil.rmtree(self._folder, ignore_errors=True)
        if cause is not None:
            sys.stdout.flush()
            print(f"\nlightning-dualpipe: {cause}", file=sys.stderr, flush=True)
        return cause is not None

    def _at_exit(self) -> None:
        if self._failed():
            deadline = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < deadline and self._alive():
                self._failed()
                time.sleep(_POLL_SECONDS)
            self._end()
        failed_itself = (self._folder / "rank-0.json").exists()
        if self._tell() and not failed_itself:
            os._exit(1)  # else the exit code would say that all went well


def watch_parent() -> None:
    """End this process when the main process that started it is gone. Does nothing in the main process."""
    parent = os.environ.get(_PARENT)
    if parent is None or int(parent) == os.getpid() or int(parent) != os.getppid():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        print("lightning-dualpipe: the main process (rank 0) is gone; this rank ends", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
