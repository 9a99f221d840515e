"""Ranks are killed at random moments, writes of checkpoints included; torchrun starts them again; what comes out?

    python benchmarks/chaos.py                             # 20 kills, some 5 minutes
    python benchmarks/chaos.py --kills 5 --seed 3 --save async

Two ranks train under torchrun, save a checkpoint directory after every step, and begin with
``ckpt_path=newest_checkpoint("checkpoints")``. Expected, whatever the moment:

    all ranks end within 30 s
    new ones are back at work within 60 s (on this machine most of it is imports)
    the run ends by itself, and its last losses are those of a run that nobody disturbed, bit for bit
    no checkpoint directory is torn
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from lightning_dualpipe.checkpoint.stored import open_stored
from lightning_dualpipe.errors import CheckpointError

ROOT = Path(__file__).parent.parent
PATIENCE = 240.0  # seconds in which a start must come to its first step, on a busy machine
TO_END = 30.0  # seconds in which all ranks of a run must be gone
TO_RETURN = 60.0
COMPARED = 5  # last losses


@dataclass
class Found:
    kills: int = 0
    in_writes: int = 0  # of these kills: while a checkpoint was being written
    runs: int = 0
    longest_end: float = 0.0  # seconds from a kill until no rank of that attempt was left
    longest_return: float = 0.0  # seconds from a kill to the next step
    torn: int = 0
    different: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150, help="of a run; another begins when it ends early")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", choices=["at once", "async"], default="at once")
    options = parser.parse_args()
    generator, found = random.Random(options.seed), Found()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        words = "the cat sat on the mat and saw a dog run over the hill to find some bread".split()
        corpus.write_text(" ".join(random.Random(0).choice(words) for _ in range(6000)))
        strategy = {"schedule": "1f1b", "save_distributed_checkpoint": "async" if options.save == "async" else True}
        undisturbed = Run(Path(folder) / "undisturbed", corpus, options.steps, {"schedule": "1f1b"}, save=False)
        expected = undisturbed.wait()[-COMPARED:]
        undisturbed.end()
        while found.kills < options.kills:
            found.runs += 1
            run = Run(Path(folder) / str(found.runs), corpus, options.steps, strategy, save=True)
            try:
                disturb(run, generator, found, options.kills)
                losses = run.wait()
            finally:
                run.end()
            if losses[-COMPARED:] != expected[-len(losses) :]:
                found.different.append(f"run {found.runs}: {losses[-COMPARED:]}, not {expected}")
            found.torn += sum(torn(path) for path in (run.folder / "checkpoints").glob("*.ckpt"))
            print(f"run {found.runs} ended by itself, {found.kills} kills so far", flush=True)
    print(
        f"{found.kills} kills in {found.runs} runs, {found.in_writes} of them while a checkpoint was being written; "
        f"all ranks ended within {found.longest_end:.1f} s, back at work within {found.longest_return:.1f} s; "
        f"{found.torn} torn checkpoints; {len(found.different)} runs with other losses"
    )
    print("\n".join(found.different), end="")
    slow = found.longest_end > TO_END or found.longest_return > TO_RETURN
    return int(bool(found.torn or found.different or slow))


class Run:
    """A training under torchrun, from its start to its end."""

    def __init__(self, folder: Path, corpus: Path, steps: int, strategy: Mapping[str, object], *, save: bool) -> None:
        folder.mkdir()
        self.folder, self.mark = folder, f"CHAOS={uuid4()}"
        arguments = ["--corpus", str(corpus), "--steps", str(steps), "--strategy", json.dumps(strategy)]
        if save:
            arguments += ["--save", "--every", "1", "--resume", "newest"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        program = str(ROOT / "tests/strategy/program.py")
        self.log = open(folder / "log", "w")  # noqa: SIM115  # as long as the run
        self.process = subprocess.Popen(
            [*torchrun, "--max-restarts", "1000", program, *arguments],
            env={**os.environ, **dict([self.mark.split("=")]), "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
            cwd=folder,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def ranks(self) -> list[int]:
        """Processes that train, not the one that watches them."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) != self.process.pid:
                try:
                    environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                if self.mark in environment and any(each.startswith("LOCAL_RANK=") for each in environment):
                    found.append(int(path.name))
        return sorted(found)

    def at_work_since(self, moment: float) -> bool:
        """Whether a step has ended since then."""
        losses = self.folder / "losses.json"
        return losses.exists() and losses.stat().st_mtime > moment

    def stacks(self) -> str:
        """What was printed last; the ranks end and print where they are."""
        for rank in self.ranks():
            os.kill(rank, signal.SIGABRT)
        time.sleep(2)
        return (self.folder / "log").read_text()[-8000:]

    def end(self) -> None:
        """Whatever is left of it."""
        self.process.kill()
        self.process.wait()
        for rank in self.ranks():
            os.kill(rank, signal.SIGKILL)
        self.log.close()

    def wait(self) -> list[float]:
        try:
            code = self.process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"a hang: {(self.folder / 'log').read_text()[-2000:]}") from None
        if code:
            raise SystemExit(f"the run ended with {code}:\n{(self.folder / 'log').read_text()[-4000:]}")
        losses: list[float] = json.loads((self.folder / "losses.json").read_text())
        return losses


def disturb(run: Run, generator: random.Random, found: Found, kills: int) -> None:
    """Until it has ended, or there were enough kills."""
    moment = time.time()
    while found.kills < kills:
        deadline = time.time() + PATIENCE
        while not run.at_work_since(moment):
            if run.process.poll() is not None:
                return
            if time.time() > deadline:
                raise SystemExit(f"not back at work after {PATIENCE} s, a hang: {run.stacks()}")
            time.sleep(0.01)
        if found.kills:
            found.longest_return = max(found.longest_return, time.time() - moment)
        time.sleep(generator.uniform(0.0, 1.0))
        ranks = run.ranks()
        if len(ranks) < 2 or run.process.poll() is not None:
            return
        writing = any((run.folder / "checkpoints").glob(".*.writing-*"))
        moment = time.time()
        os.kill(generator.choice(ranks), signal.SIGKILL)
        found.kills += 1
        found.in_writes += writing
        while set(run.ranks()) & set(ranks):
            if time.time() > moment + PATIENCE:
                raise SystemExit(f"ranks have not ended after {PATIENCE} s, a hang: {run.stacks()}")
            time.sleep(0.01)
        found.longest_end = max(found.longest_end, time.time() - moment)


def torn(path: Path) -> bool:
    try:
        open_stored(path).verify()
    except CheckpointError as error:
        print(error)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
