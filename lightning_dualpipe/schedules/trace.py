"""Timelines as Chrome traces, which https://ui.perfetto.dev shows, and chrome://tracing.

    process    a rank
    thread     compute, communication, simulated
    slice      an action, and the phases of the model it runs: "3F7 blocks.5 attend"

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU has the format. Times in it
are microseconds.
"""

import json
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_dualpipe.schedules.action import Schedule, format_step
from lightning_dualpipe.schedules.palette import NAMES
from lightning_dualpipe.schedules.record import StepRecord
from lightning_dualpipe.schedules.simulate import Costs, Span, simulate

__all__ = ["write_record_trace", "write_schedule_trace"]

_Event = dict[str, Any]

_COMPUTE, _COMMUNICATION, _SIMULATED = range(3)
_THREADS = {_COMPUTE: "compute", _COMMUNICATION: "communication", _SIMULATED: "simulated"}


def write_schedule_trace(schedule: Schedule, costs: Costs, path: str | PathLike[str]) -> Path:
    """The simulated schedule; a cost of 1 is shown as a millisecond."""
    events: list[_Event] = []
    for rank, spans in enumerate(simulate(schedule, costs).spans):
        events += [*_names(rank, f"rank {rank}", [_COMPUTE]), *_simulated(spans, rank, _COMPUTE, unit=1e3)]
    return _write(events, path)


def write_record_trace(record: StepRecord, path: str | PathLike[str]) -> Path:
    """A step that was recorded; the thread below each rank's own shows the simulation of it."""
    events: list[_Event] = []
    ideal = record.simulated()
    for rank, recorded in enumerate(record.ranks):
        events += _names(rank, f"rank {rank} (pipeline rank {recorded.pipeline_rank})", _THREADS)
        for piece in recorded.slices:
            thread = _COMPUTE if piece.work.computes else _COMMUNICATION
            what = piece.phases if piece.work.computes else f"{piece.work} {piece.phases}"
            name = f"{piece.action} {what}".rstrip()
            arguments = {
                "stage": piece.action.stage,
                "microbatch": piece.action.microbatch,
                "kind": NAMES[piece.action.kind],
            }
            events.append(_slice(rank, thread, name, piece.work, piece.start * 1e6, piece.seconds * 1e6, arguments))
        events += _simulated(ideal.spans[recorded.pipeline_rank], rank, _SIMULATED, unit=1e6)
    return _write(events, path)


def _names(process: int, name: str, threads: Iterable[int]) -> Iterator[_Event]:
    """Without the indices Perfetto sorts processes by when they begin."""
    yield _metadata(process, 0, "process_name", name=name)
    yield _metadata(process, 0, "process_sort_index", sort_index=process)
    for thread in threads:
        yield _metadata(process, thread, "thread_name", name=_THREADS[thread])
        yield _metadata(process, thread, "thread_sort_index", sort_index=thread)


def _metadata(process: int, thread: int, what: str, **arguments: object) -> _Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": arguments}


def _simulated(spans: Iterable[Span], process: int, thread: int, *, unit: float) -> Iterator[_Event]:
    for step, start, end in spans:
        kind = "overlapped" if len(step) == 2 else NAMES[step[0].kind]
        arguments = {"stages": [a.stage for a in step], "microbatches": [a.microbatch for a in step]}
        yield _slice(process, thread, format_step(step), kind, start * unit, (end - start) * unit, arguments)


def _slice(
    process: int, thread: int, name: str, category: str, start: float, duration: float, arguments: _Event
) -> _Event:
    return {
        "ph": "X",
        "name": name,
        "cat": str(category),
        "pid": process,
        "tid": thread,
        "ts": round(start, 3),  # a nanosecond: finer than any clock here
        "dur": round(duration, 3),
        "args": arguments,
    }


def _write(events: list[_Event], path: str | PathLike[str]) -> Path:
    path = Path(path)
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.write(",\n".join(json.dumps(event, separators=(",", ":")) for event in events))
        file.write("\n]}\n")
    return path
