"""Start the ranks of one node, and see to it that none outlives the others.

    main process (local rank 0) ──starts──► ranks 1..n-1       the same script, as Lightning does
        ├─ observer thread: when a rank has failed, the others get a moment to fail on their own and
        │  say why; then they are ended. It ends this process too if that waits for one that is gone
        └─ at exit: nobody is left behind, and the first cause is told last
    every other rank
        └─ watches its parent: when the main process is gone, it goes too

Under torchrun and SLURM those start and end the ranks; only reports are written there.
"""

import atexit
import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from typing_extensions import override

from lightning_dualpipe.strategy.failures import (
    LocalRun,
    first_cause,
    has_reported,
    read_reports,
    report_uncaught_errors,
    tell,
)
from lightning_dualpipe.strategy.interrupts import UnheardSignal, saves_between_batches

__all__ = ["PipelineLauncher", "join_run"]

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 6.0  # for ranks to fail on their own after the first one
_UNHEARD_SECONDS = 4.0  # for the main process to come to where it can handle a signal
_UNHEARD_SAVING_SECONDS = 30.0  # and where it then saves, between two batches: a batch may take long
_UNHEARD_UNDER_TORCHRUN_SECONDS = 25.0  # the same; torchrun kills its ranks after 30, and they would not say why
_PARTING_SECONDS = 1.0  # for ranks to end when the main process failed first: they cannot know it
_FREED_SECONDS = 3.0  # for the main process to go on when the ranks it may have waited for are gone
_LEAVING_SECONDS = 20.0  # for callbacks and exit handlers of a main process that is on its way out
_PATIENCE_SECONDS = 10.0  # after which a main process that waits for others says so


class PipelineLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher by subprocesses, with an end that tells the reason."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            trainer.strategy.check_model(trainer)  # now, so that it is said once and not by every rank
            run = LocalRun(os.getpid(), Path(tempfile.mkdtemp(prefix="lightning-dualpipe-")))
            run.announce()
            try:
                self._call_children_scripts()
            except BaseException:
                shutil.rmtree(run.folder)
                self.kill(signal.SIGKILL)
                raise
            rank = self.cluster_environment.node_rank() * self.num_processes
            report_uncaught_errors(rank=rank)
            _Observer(trainer, run.folder, rank, self.procs).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class _Observer(threading.Thread):
    """Ends the run when a rank has failed. This thread tells why only if the main process cannot do so at its exit."""

    def __init__(self, trainer: Trainer, folder: Path, rank: int, processes: list[subprocess.Popen[bytes]]) -> None:
        super().__init__(daemon=True, name="rank-observer")
        self._trainer = trainer
        self._folder = folder
        self._main = os.getpid()
        self._rank = rank  # of the main process
        self._processes = dict(enumerate(processes, start=rank + 1))
        self._signal = UnheardSignal()
        self._ended: dict[int, int | None] = {}  # exit codes of the ranks that ended on their own
        self._taking_stock = threading.Lock()
        self._telling = threading.Lock()
        atexit.register(self._at_exit)

    @override
    def run(self) -> None:
        while not self._failed():
            if not self._running():
                return
            self._signal.wait(_POLL_SECONDS)
        if not self._unheard():
            self._wait(_GRACE_SECONDS, lambda: not self._running())
        self._end_ranks()
        self._wait(_FREED_SECONDS, self._reported)
        if self._trainer.state.status == TrainerStatus.INTERRUPTED:  # its callbacks are at work
            self._wait(_LEAVING_SECONDS, self._reported)
        if self._reported():  # it has noticed; a script may catch the error and go on, so only its exit is limited
            self._wait(math.inf, lambda: not threading.main_thread().is_alive())
            time.sleep(_LEAVING_SECONDS)
        if self._tell():
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(1)

    def _failed(self) -> bool:
        """Whether any rank has failed, this one included, or this one is to end and cannot."""
        self._take_stock()
        return self._unheard() or any(self._ended.values()) or any(self._folder.glob("rank-*.json"))

    def _unheard(self) -> bool:
        """Whether a signal has told this process to end, but its main thread waits for another rank."""
        saves = saves_between_batches(self._trainer)
        return self._signal.seconds() > (_UNHEARD_SAVING_SECONDS if saves else _UNHEARD_SECONDS)

    def _reported(self) -> bool:
        """Whether the main process knows that it fails."""
        return has_reported(self._folder, self._rank)

    def _running(self) -> list[int]:
        """The ranks that have not ended."""
        self._take_stock()
        return [rank for rank, process in self._processes.items() if process.returncode is None]

    def _take_stock(self) -> None:
        with self._taking_stock:
            for rank, process in self._processes.items():
                if rank not in self._ended and process.poll() is not None:
                    self._ended[rank] = process.returncode

    def _wait(self, seconds: float, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 4)

    def _end_ranks(self) -> None:
        self._take_stock()
        with self._taking_stock:  # what ends from here on did not end on its own
            for process in self._processes.values():
                process.kill()
                process.wait()
            self._processes = {rank: self._processes[rank] for rank in self._ended}

    def _tell(self) -> bool:
        """The first cause, if there is one. False: the other thread has told it, or is about to."""
        if not self._telling.acquire(blocking=False):
            return False
        cause = first_cause(read_reports(self._folder), self._ended)
        if cause is None and self._unheard():
            cause = f"stopped by a signal while rank {self._rank} waited for another rank"
        shutil.rmtree(self._folder, ignore_errors=True)
        if cause is not None:
            tell(cause)
        return True

    def _at_exit(self) -> None:
        if os.getpid() != self._main:  # a fork of it ends
            return
        left = self._trainer.state.status == TrainerStatus.INTERRUPTED  # in the middle of a run
        if not self._failed() and not left:
            self._wait_for_ranks()
        self._wait(_PARTING_SECONDS if self._is_first_cause() else _GRACE_SECONDS, lambda: not self._running())
        failed, reported, at_work = self._failed(), self._reported(), self._running()
        self._end_ranks()
        self._tell()
        if left and not failed and at_work:
            tell(f"rank {self._rank} left; ranks {at_work} were still at work and were ended")
        if not reported and (failed or (left and at_work)):
            os._exit(1)  # else the exit code would say that all went well

    def _wait_for_ranks(self) -> None:
        """As long as it takes: a rank may have more to do than this one."""
        self._wait(_PATIENCE_SECONDS, lambda: self._failed() or not self._running())
        if self._running() and not self._failed():
            tell(f"rank {self._rank} has ended and waits for ranks {self._running()}; Ctrl+C ends them")
            with contextlib.suppress(KeyboardInterrupt):
                self._wait(math.inf, lambda: self._failed() or not self._running())

    def _is_first_cause(self) -> bool:
        """Whether the main process failed first; then the others wait for it, and cannot know."""
        causes = [report for report in read_reports(self._folder) if report.kind != "lost peer"]
        return bool(causes) and causes[0].rank == self._rank and causes[0].kind == "error"


def join_run(rank: int) -> None:
    """For every rank to call before anything else can go wrong; what the launcher started ends with its parent."""
    run, watched = LocalRun.announced(), _WATCH in {thread.name for thread in threading.enumerate()}
    if run is None:
        if "TORCHELASTIC_ERROR_FILE" in os.environ and not watched:
            _watch(rank, partial(_heed_torchrun, UnheardSignal(), rank))
    elif run.started_this_process():
        if not watched:
            _watch(rank, partial(_watch_parent, run, rank))
    elif not _is_running(run.main):  # it ended before this rank came here
        _leave(run, rank)


_WATCH = "parent-watch"


def _watch(rank: int, whoever_ends_it: Callable[[], None]) -> None:
    """In a thread beside the main one."""
    report_uncaught_errors(rank=rank)
    threading.Thread(target=whoever_ends_it, daemon=True, name=_WATCH).start()


def _heed_torchrun(signal_: UnheardSignal, rank: int) -> None:
    """When torchrun ends this rank and it waits for one that is gone; else torchrun would wait for 30 seconds.

    Where a callback saves after the batch, not before torchrun is about to kill it: this rank may be in one long call,
    or wait for one that is.
    """
    while signal_.seconds() <= (_UNHEARD_UNDER_TORCHRUN_SECONDS if saves_between_batches() else _UNHEARD_SECONDS):
        signal_.wait(_POLL_SECONDS)
    tell(f"rank {rank} was told to end while it waited for another rank, and ends")
    os._exit(128 + signal.SIGTERM)


def _watch_parent(run: LocalRun, rank: int) -> None:
    while os.getppid() == run.main:
        time.sleep(_POLL_SECONDS)
    _leave(run, rank)


def _leave(run: LocalRun, rank: int) -> None:
    """End a rank whose main process is gone."""
    main_rank = rank - int(os.environ["LOCAL_RANK"])
    cause = first_cause(read_reports(run.folder), {main_rank: None})
    shutil.rmtree(run.folder, ignore_errors=True)
    tell(f"{cause}. The main process is gone, so rank {rank} ends")
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
