"""Ways for one rank of a program to fail, named by the environment variable PROGRAM_FAULT.

    PROGRAM_FAULT='{"place": "training_step", "rank": 1, "what": "raise_"}'

A program calls ``fault.reached(place, step)``; at step STEP of that rank it happens. ``fault.json`` says
when, so that a test can tell how long the others took to end.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

STEP = 5


class Fault:
    def __init__(self, place: str = "nowhere", rank: int | None = None, what: str = "raise_") -> None:
        self.place, self.rank, self.what = place, rank, what

    def reached(self, place: str, step: int = STEP) -> None:
        if (place, step) == (self.place, STEP) and self.rank in (None, _rank()):
            if not Path("fault.json").exists():
                Path("fault.json").write_text(json.dumps(time.time()))
            getattr(self, self.what)()

    def raise_(self) -> None:
        raise ArithmeticError("the sky is falling")

    def import_(self) -> None:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401

    def leave(self) -> None:
        sys.exit(0)

    def hang(self) -> None:
        """As in a collective that never completes: in C, where no Python signal handler runs."""
        ctypes.CDLL(None).sleep(600)

    def hang_or_raise(self) -> None:
        """NCCL does not notice when a peer is gone."""
        if _rank() == 0:
            self.hang()
        self.raise_()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self) -> None:
        """As a debugger, or a host that has no memory left: the process is there and does nothing."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def work(self) -> None:
        """For long, without talking to anybody."""
        until = time.monotonic() + 8
        while time.monotonic() < until:
            sum(range(1000))

    def kill_main(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)

    def kill_main_and_hang(self) -> None:
        self.kill_main()
        self.hang()

    def press_ctrl_c(self) -> None:
        """A terminal sends it to all processes of its group; and again, out of impatience."""
        for _ in range(3):
            os.killpg(0, signal.SIGINT)
            time.sleep(0.02)

    def interrupt_main(self) -> None:
        os.kill(os.getppid(), signal.SIGINT)

    def interrupt_main_and_hang(self) -> None:
        self.interrupt_main()
        self.hang()

    def terminate_itself(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def terminate_main_and_take_long(self) -> None:
        """In one call of C, for longer than a rank that has nothing to save would be left alone."""
        self.terminate_main()
        ctypes.CDLL(None).sleep(6)

    def be_requeued(self) -> None:
        """SLURM's notice that time is nearly over, to this rank before the others."""
        os.kill(os.getpid(), signal.SIGUSR1)

    def terminate_main(self) -> None:
        os.kill(os.getppid(), signal.SIGTERM)


def _rank() -> int:
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


fault = Fault(**json.loads(os.environ.get("PROGRAM_FAULT", "{}")))
