"""Why a run of several processes ended, told last and once.

When one rank fails, the others fail a moment later because it is gone, and their tracebacks bury
the reason. So every rank writes down how it ends, and whoever is left at last tells the first cause:

    rank 2 raises                          report ──┐
    ranks 0 and 1 lose their connection    reports ─┼──► first_cause: the earliest that is no consequence,
    rank 3 is killed and writes nothing    exit code┘    else the rank that ended without a word

    devices=N   the main process tells (strategy.launcher)
    torchrun    its summary does, which takes the first report by time from its error files
    SLURM       nobody: each rank's own traceback is all there is
    many hosts  ranks that have lost others name them (strategy.roll_call)
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dualpipe.errors import CheckpointError, ConfigurationError, TrainingError

__all__ = [
    "LocalRun",
    "Report",
    "first_cause",
    "lost_a_peer",
    "read_reports",
    "report_failure",
    "report_uncaught_errors",
    "tell",
]

_VARIABLE = "LIGHTNING_DUALPIPE_RUN"
_LOST_PEER = ("closed by peer", "reset by peer", "socket closed", "broken pipe", "timed out", "timeout", "connect")


@dataclass(frozen=True, slots=True)
class LocalRun:
    """The ranks that one main process has started on this node, as all of them know it from the environment."""

    main: int  # process id of the main process, local rank 0
    folder: Path  # where its ranks leave their reports

    @classmethod
    def announced(cls) -> "LocalRun | None":
        main, _, folder = os.environ.get(_VARIABLE, "").partition(":")
        return cls(int(main), Path(folder)) if folder else None

    @classmethod
    def joined(cls) -> "LocalRun | None":
        """The run this process is a rank of; data workers and programs that a rank starts only inherit the variable."""
        run = cls.announced()
        return run if run is not None and (os.getpid() == run.main or run.started_this_process()) else None

    def announce(self) -> None:
        os.environ[_VARIABLE] = f"{self.main}:{self.folder}"

    def started_this_process(self) -> bool:
        """While the main process lives; a process whose parent is gone gets another one."""
        return os.getppid() == self.main and os.environ.get("LOCAL_RANK", "0") != "0"


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says of its own end."""

    rank: int
    when: float  # seconds since the epoch
    kind: Literal["error", "interrupt", "lost peer"]
    error: str  # type and message
    text: str  # with traceback
    shown: bool = False  # whether the rank itself has printed the text


def report_failure(error: BaseException, *, rank: int) -> None:
    """Write down why this rank ends, once; never raises."""
    try:
        if isinstance(error, SystemExit) and not error.code and not isinstance(error, SIGTERMException):
            return  # it ends of its own accord
        report = _report(error, rank)
        run = LocalRun.joined()
        if run is not None and not (path := _path(run.folder, rank)).exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({name: value for name, value in asdict(report).items() if name != "shown"}))
            partial.replace(path)
        if (torchrun := os.environ.get("TORCHELASTIC_ERROR_FILE")) and not Path(torchrun).exists():
            Path(torchrun).write_text(json.dumps(_for_torchrun(report)))
    except Exception as trouble:
        sys.stderr.write(f"rank {rank} could not write down its failure: {trouble!r}\n")


def report_uncaught_errors(*, rank: int) -> None:
    """From now on, errors outside of a Trainer are reported too, and it is known whose traceback was printed.

    Where somebody will tell the first cause, a rank that merely lost a peer prints one line only.
    """
    usual, run = sys.excepthook, LocalRun.joined()

    def report(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
        report_failure(error, rank=rank)
        if run is not None and _kind(error) == "lost peer":
            tell(f"rank {rank} ends because it lost its connection to another rank")
            if os.getpid() != run.main:  # if that was the main process, the thread that watches it has the last word
                time.sleep(_ORPHANED_WITHIN_SECONDS)
            return
        if "TORCHELASTIC_ERROR_FILE" in os.environ and lost_a_peer(error):  # torchrun will show the traceback, last
            tell(f"rank {rank} ends: {_summary(error)}")
            return
        usual(kind, error, place)
        if run is not None:
            with contextlib.suppress(OSError):  # the folder may be gone
                _path(run.folder, rank).with_suffix(".shown").touch()

    sys.excepthook = report


_ORPHANED_WITHIN_SECONDS = 0.5  # a process that dies closes its connections first; then its children lose their parent


def read_reports(folder: Path) -> list[Report]:
    """In the order in which ranks failed."""
    reports = [
        Report(**json.loads(path.read_text()), shown=path.with_suffix(".shown").exists())
        for path in folder.glob("rank-*.json")
    ]
    return sorted(reports, key=lambda report: report.when)


def has_reported(folder: Path, rank: int) -> bool:
    return _path(folder, rank).exists()


def first_cause(reports: list[Report], ended: Mapping[int, int | None]) -> str | None:
    """One message that names the rank and the reason; None if nothing failed.

    Args:
        reports: in order of time.
        ended: rank -> exit code, of processes that ended on their own; None if nobody knows the code.
    """
    causes = [report for report in reports if report.kind != "lost peer"]
    if causes:
        return _cause(causes)
    reported = {report.rank for report in reports}
    silent = {rank: code for rank, code in ended.items() if code != 0 and rank not in reported}
    if silent:  # those killed by a signal, whose code is negative, before those that exited
        rank = min(silent, key=lambda rank: (silent[rank] or 0, rank))
        return f"rank {rank} {_fate(silent[rank])}"
    if not reports:
        return None
    left = [f"rank {rank} had left with exit code 0" for rank, code in ended.items() if code == 0]
    hint = "; ".join(left) or "the cause is on another node, whose output tells it"
    return f"rank {reports[0].rank} lost its connection to another rank; {hint}. {reports[0].error}"


def tell(message: str) -> None:
    """On standard error, after everything that was printed before.

    On the original one: while torch prints a traceback, it has another in its place, for all threads.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none: the run still ends
        sys.stdout.flush()
        stream = sys.__stderr__ or sys.stderr
        stream.write(f"lightning-dualpipe: {message}\n")
        stream.flush()


def _cause(causes: list[Report]) -> str:
    first = causes[0]
    alike = sorted(report.rank for report in causes if report.error == first.error)
    who = f"rank{'s' * (len(alike) > 1)} {', '.join(map(str, alike))}"
    if first.kind == "interrupt":
        return f"{who} stopped by {'SIGINT' if first.error == 'KeyboardInterrupt' else 'SIGTERM'}"
    summary = f"{who} failed{' first' * (len(alike) == 1)}: {first.error}"
    return summary if first.shown or first.text == first.error else f"{first.text.rstrip()}\n{summary}"


def _fate(code: int | None) -> str:
    if code is None:
        return "is gone without a word: it was killed, or crashed"
    if code >= 0:
        return f"exited with code {code}, its own output above says why"
    names = {number.value: number.name for number in signal.Signals}
    hint = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {names.get(-code, f'signal {-code}')}{hint}"


def _report(error: BaseException, rank: int) -> Report:
    summary = _summary(error)
    if isinstance(
        error, CheckpointError | ConfigurationError | TrainingError
    ):  # for the user, who need not know where in our code it was found
        summary = text = f"{type(error).__name__}: {error}"
    else:
        text = "".join(traceback.format_exception(error))
    return Report(rank, time.time(), _kind(error), summary, text)


def _summary(error: BaseException) -> str:
    """Type, message and notes."""
    return "".join(traceback.format_exception_only(error)).strip()


def _kind(error: BaseException) -> Literal["error", "interrupt", "lost peer"]:
    if isinstance(error, KeyboardInterrupt | SIGTERMException):
        return "interrupt"
    return "lost peer" if lost_a_peer(error) else "error"


def lost_a_peer(error: BaseException) -> bool:
    """Whether a rank ends because of another one, that is gone or does not answer."""
    return any(_is_lost_connection(link) for link in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_lost_connection(error: BaseException) -> bool:
    """NCCL's and the store's errors have a type of their own, gloo's name its source file."""
    text = str(error).lower()
    from_gloo = isinstance(error, RuntimeError) and "gloo/" in text and any(sign in text for sign in _LOST_PEER)
    return from_gloo or isinstance(error, dist.DistError)


def _for_torchrun(report: Report) -> dict[str, object]:
    """In the form of torchrun's error files; it takes the earliest, to the second, for the root cause."""
    later = 2 if report.kind == "lost peer" else 0  # than ranks without a file, which it stamps when it notices them
    extra = {"py_callstack": report.text, "timestamp": str(int(report.when) + later)}
    return {"message": {"message": report.error, "extraInfo": extra}}


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"
