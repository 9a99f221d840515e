"""Why a run of several processes ended, told last and once.

When one rank fails, the others fail a moment later because it is gone, and their tracebacks bury
the reason. So every rank writes its own down, the process that started the ranks waits until all
are gone, and prints the first cause as the last thing.

    rank 2 raises ─► report ─┐
    rank 0, 1, 3 lose their connection ─► report ─┤► first_cause: the earliest that is not a consequence,
    rank 3 is killed by the system ─► no report ──┘  or the rank that died without a word
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

__all__ = ["FOLDER_VARIABLE", "Report", "first_cause", "read_reports", "report_failure"]

FOLDER_VARIABLE = "LIGHTNING_DUALPIPE_FAILURES"
_LOST_PEER = ("connection closed", "connection reset", "broken pipe", "timed out", "connect() timed", "socket", "peer")


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says of its own end."""

    rank: int
    when: float  # seconds since the epoch
    error: str  # type and message, one line or few
    text: str  # with traceback
    is_consequence: bool  # another rank was gone


def report_failure(error: BaseException, *, rank: int) -> None:
    """Write down why this rank fails; never raises. Under torchrun, also where torchrun looks for it."""
    try:
        lines = traceback.format_exception(error)
        summary = "".join(traceback.format_exception_only(error)).strip()
        report = Report(rank, time.time(), summary, "".join(lines), _lost_a_peer(error))
        if folder := os.environ.get(FOLDER_VARIABLE):
            path = Path(folder) / f"rank-{rank}.json"
            if not path.exists():  # the first failure of a rank is the one that counts
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(asdict(report)))
                partial.replace(path)
        if "TORCHELASTIC_ERROR_FILE" in os.environ and not report.is_consequence:
            get_error_handler().record_exception(error)
    except Exception as trouble:
        print(f"rank {rank} could not write down its failure: {trouble!r}", flush=True)


def read_reports(folder: Path) -> list[Report]:
    """In the order in which ranks failed."""
    reports = [Report(**json.loads(path.read_text())) for path in folder.glob("rank-*.json")]
    return sorted(reports, key=lambda report: report.when)


def first_cause(reports: list[Report], died: Mapping[int, int]) -> str | None:
    """One message that names the rank and the reason; None if nothing failed.

    Args:
        died: rank -> exit code of the processes that ended on their own with a code other than 0.
    """
    reported = {report.rank for report in reports}
    silent = {rank: code for rank, code in died.items() if rank not in reported}
    causes = [report for report in reports if not report.is_consequence]
    if causes:
        return f"rank {causes[0].rank} failed first:\n{causes[0].text.rstrip()}"
    if silent:
        rank, code = min(silent.items())
        return f"rank {rank} {_fate(code)}; the other ranks ended because it was gone"
    return f"rank {reports[0].rank} failed first:\n{reports[0].text.rstrip()}" if reports else None


def _fate(code: int) -> str:
    if code >= 0:
        return f"exited with code {code} (its own output above says why)"
    name = signal.Signals(-code).name
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _lost_a_peer(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError | RuntimeError) and any(sign in text for sign in _LOST_PEER)
