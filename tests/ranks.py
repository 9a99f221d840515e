"""Run a function on several local processes that form one process group.

    losses = run_ranks(4, train_on_rank, config)      # one result per rank

Processes are forked from a server that has already imported what ranks need, so a world of four starts
in well under a second; they meet in a temporary file, so no port can be taken. Many small cases still
take less time in the same processes, one after another, each in a process group of its own:

    CASES = Cases(4, train_on_rank, {"eager": (config,), "traced": (other,)})
    losses = CASES["eager"]                           # as above; or the failure of this case

A forked process imports ``__main__`` again, under another name, as every start method but fork
does. Under pytest that is harmless; a script that calls ``run_ranks`` needs the usual
``if __name__ == "__main__":``, or each of its ranks would start ranks of its own. For the same
reason ``fn`` must be a function of a module, and its arguments and result must be picklable.
"""

import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# The last imports nearly all of the package: four ranks would take most of a second of two cores to do so.
CONTEXT.set_forkserver_preload(["torch", "sympy", "pytest", "lightning.pytorch", "tests.strategy.runs"])

_GRACE = 0.5  # seconds after a failure in which to hear of others


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = 60
) -> list[Any]:
    """Call ``fn(rank, *args)`` on every rank and return the results in rank order.

    The first failing rank fails the test with its own traceback, a rank that dies or gives no
    answer within ``timeout`` seconds (also that of its process group) fails it too. However it
    ends, no process is left.
    """
    (results,) = _run(world_size, fn, [args], backend, timeout)
    return results


class Cases:
    """``run_ranks`` with one function and several sets of arguments, by name; ``timeout`` is that of each.

    All are run when the first result is asked for. A case that fails ends the processes, and those
    after it get new ones: it takes no other with it.
    """

    def __init__(
        self,
        world_size: int,
        fn: Callable[..., Any],
        cases: Mapping[str, tuple[Any, ...]],
        *,
        backend: str = "gloo",
        timeout: float = 60,
    ) -> None:
        self._cases = cases
        self._start = lambda names: _run(world_size, fn, [cases[name] for name in names], backend, timeout)
        self._found: dict[str, list[Any] | AssertionError] = {}

    def __getitem__(self, name: str) -> list[Any]:
        while self._found.keys() != self._cases.keys():
            self._go_on()
        found = self._found[name]
        if isinstance(found, AssertionError):
            raise found
        return found

    def _go_on(self) -> None:
        waiting = [name for name in self._cases if name not in self._found]
        runs = self._start(waiting)
        for name in waiting:
            try:
                self._found[name] = next(runs)
            except AssertionError as failure:
                self._found[name] = failure
                return
        runs.close()


def _run(
    world_size: int, fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], backend: str, timeout: float
) -> Iterator[list[Any]]:
    """The results of one call after another, until one fails."""
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        workers: list[ForkServerProcess] = []
        try:
            for rank in range(world_size):
                mine, theirs = CONTEXT.Pipe(duplex=False)
                job = (theirs, f"{folder}/rendezvous", backend, timeout, rank, world_size, fn, calls)
                workers.append(CONTEXT.Process(target=_work, args=job, daemon=True))
                pipes.append(mine)
                workers[-1].start()
                theirs.close()  # so that a rank that dies shows up as end-of-file
            for _ in calls:
                yield _collect(pipes, timeout)
        finally:
            _end(workers)
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    answers: dict[int, _Answer] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(pipes):
        failed = [answer for answer in answers.values() if not answer.succeeded]
        patience = _GRACE if failed else max(0.0, deadline - time.monotonic())
        silent = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        heard = {silent[pipe] for pipe in wait(list(silent), patience)}  # type: ignore[index]
        if not heard and failed:
            break
        assert heard, f"no answer from ranks {sorted(silent.values())} within {timeout:g} s"
        answers |= {rank: _receive(pipes[rank]) for rank in heard}
    _raise_first_cause(answers)
    return [answers[rank].value for rank in range(len(pipes))]


class _Answer(NamedTuple):
    succeeded: bool
    value: Any  # the result, or a traceback
    at: float  # seconds on the clock that all processes of a machine share


def _receive(pipe: Connection) -> _Answer:
    try:
        return _Answer(*pickle.loads(pipe.recv_bytes()))
    except EOFError:
        return _Answer(False, "it died without an answer", at=0.0)


def _raise_first_cause(answers: dict[int, _Answer]) -> None:
    """A rank that fails takes its peers with it, so the first failure is the cause; a death is one in any case."""
    failed = [(answer.at, rank, answer.value) for rank, answer in answers.items() if not answer.succeeded]
    if failed:
        _, rank, value = min(failed)
        raise AssertionError(f"rank {rank} failed:\n{value}")


def _end(workers: list[ForkServerProcess]) -> None:
    """Nobody needs them any more: their answers have been read, or another rank has failed the test."""
    for worker in workers:
        if worker.pid is not None:  # it was started
            worker.kill()
            worker.join()
            worker.close()


def _work(
    pipe: Connection,
    rendezvous: str,
    backend: str,
    timeout: float,
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
) -> None:
    gc.freeze()  # what was imported before the fork lives as long as this process: collections need not look at it
    torch.set_num_threads(1)
    try:
        for index, args in enumerate(calls):
            dist.init_process_group(
                backend,
                init_method=f"file://{rendezvous}-{index}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            _answer(pipe, True, fn(rank, *args))
            dist.barrier()  # leave together: a rank still talking must not lose its peer
            if index + 1 < len(calls):
                dist.destroy_process_group()
    except BaseException:
        _answer(pipe, False, traceback.format_exc())


def _answer(pipe: Connection, succeeded: bool, value: Any) -> None:
    """By value: ``pipe.send`` would share the memory of tensors, which ends with this process."""
    pipe.send_bytes(pickle.dumps((succeeded, value, time.monotonic())))
