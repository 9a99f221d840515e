"""Start programs as users do, let them end, and look at what they leave.

    ended = run_together({"killed": Program(["python", "train.py"], fault=...), ...})

Programs of one call run at the same time: most of their time goes into imports, one process after another.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).parent.parent.parent
SCRIPT = (sys.executable, str(ROOT / "tests/strategy/program.py"))
MODULE = (sys.executable, "-m", "tests.strategy.program")
PATIENCE = 240  # seconds for imports on a busy machine
TO_END = 30  # seconds after a fault in which every process must be gone


@dataclass(frozen=True)
class Program:
    """One command, or several that are started together, as on several nodes."""

    commands: Sequence[Sequence[str]]
    fault: Mapping[str, Any] = field(default_factory=dict)  # of tests/strategy/faults.py
    environments: Sequence[Mapping[str, str]] = ()  # one for each command


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    output: str
    error: str
    seconds: float  # from the fault until the last process was gone; 0 without a fault
    losses: list[float]
    left_behind: list[str]  # temporary files
    folder: Path

    @property
    def last_words(self) -> str:
        """What standard error ends with, from the last message of ours on."""
        return "lightning-dualpipe: " + self.error.rpartition("lightning-dualpipe: ")[2]


def run_together(programs: Mapping[str, Program], folder: Path) -> dict[str, Ended]:
    with ThreadPoolExecutor(len(programs)) as pool:
        futures = {name: pool.submit(run, program, folder / name) for name, program in programs.items()}
    return {name: future.result() for name, future in futures.items()}


def run(program: Program, folder: Path) -> Ended:
    folder.mkdir(parents=True)
    temporary = Path(tempfile.mkdtemp(prefix="run-"))  # a short path: multiprocessing has sockets in it
    stubs = folder / "stubs/transformers/__init__.py"  # torchmetrics would import it in every rank, for a second
    stubs.parent.mkdir(parents=True)
    stubs.write_text("def __getattr__(name):\n    return object\n")
    mark = f"DUALPIPE_PROGRAM={uuid4()}"
    path = os.pathsep.join(filter(None, [str(folder / "stubs"), str(ROOT), os.environ.get("PYTHONPATH")]))
    outer = {name: value for name, value in os.environ.items() if not name.startswith(_SET_BY_RUNS)}
    environment = {
        **outer,
        **dict([mark.split("=")]),
        "PYTHONPATH": path,
        "PROGRAM_FAULT": json.dumps(dict(program.fault)),
        "TMPDIR": str(temporary),
    }
    with open(folder / "output", "w") as output, open(folder / "error", "w") as error:
        mains = [
            subprocess.Popen(
                command,
                env={**environment, **(program.environments[index] if program.environments else {})},
                cwd=folder,
                stdout=output,
                stderr=error,
                start_new_session=True,  # so that Ctrl+C of a program stays in it
            )
            for index, command in enumerate(program.commands)
        ]
        try:
            gone = _wait(mains, mark, folder)
        finally:
            for pid in _alive(mark):
                os.kill(pid, signal.SIGKILL)
            codes = [main.wait() for main in mains]
    left_behind = [path.name for path in temporary.iterdir() if not path.name.startswith(_KEPT_BY_TORCH)]
    shutil.rmtree(temporary)
    losses, fault = folder / "losses.json", folder / "fault.json"
    return Ended(
        codes,
        (folder / "output").read_text(),
        (folder / "error").read_text(),
        gone - json.loads(fault.read_text()) if fault.exists() else 0.0,
        json.loads(losses.read_text()) if losses.exists() else [],
        left_behind,
        folder,
    )


_KEPT_BY_TORCH = ("pymp-", "torchelastic_", "torchinductor_")
_SET_BY_RUNS = ("MASTER_", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PL_")


def _wait(mains: Sequence[subprocess.Popen[bytes]], mark: str, folder: Path) -> float:
    """When the last process was gone, or patience with it ended."""
    fault, deadline = folder / "fault.json", time.time() + PATIENCE
    while any(main.poll() is None for main in mains) or _alive(mark):
        if fault.exists():
            deadline = min(deadline, fault.stat().st_mtime + TO_END)
        if time.time() > deadline:
            break
        time.sleep(0.1)
    return time.time()


def _alive(mark: str) -> list[int]:
    """Processes with this mark in their environment; those that have ended have no environment any more."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and mark in _environment(path)]


def _environment(process: Path) -> str:
    try:
        return (process / "environ").read_bytes().decode(errors="replace")
    except OSError:  # it ended, or is another user's
        return ""
