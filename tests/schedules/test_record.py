"""A recorded step by hand: sums, medians, and the simulation they lead to."""

import json
from pathlib import Path

import pytest

from lightning_dualpipe.schedules import SCHEDULES, Action, Costs, Kind, Schedule, build_schedule, simulate
from lightning_dualpipe.schedules.draw_record import draw_record, record_table
from lightning_dualpipe.schedules.record import RankRecord, Slice, StepRecord, Work
from lightning_dualpipe.schedules.trace import write_record_trace, write_schedule_trace
from tests.marks import needs

COSTS = Costs(forward=2.0, backward_input=2.5, backward_weight=1.0, overlapped=5.0)
WORK = {
    Kind.FORWARD: Work.FORWARD,
    Kind.BACKWARD: Work.BACKWARD,
    Kind.BACKWARD_INPUT: Work.BACKWARD,
    Kind.BACKWARD_WEIGHT: Work.WEIGHTS,
}


def ideal_record(schedule: Schedule, costs: Costs = COSTS) -> StepRecord:
    """A step that ran as simulated; a pair is one piece of its forward and one of its backward."""

    def slices(rank: int) -> list[Slice]:
        found = []
        for step, start, end in simulate(schedule, costs).spans[rank]:
            middle = start + (end - start) * 0.4 if len(step) == 2 else end
            for action, (since, until) in zip(step, [(start, middle), (middle, end)], strict=False):
                if action.kind is Kind.BACKWARD:  # ends with the weight gradients that it had put aside
                    input_end = until - 1.0 * (until - since) / 3.5
                    found.append(Slice(action, Work.BACKWARD, "", since, input_end))
                    found.append(Slice(action, Work.WEIGHTS, "", input_end, until))
                else:
                    found.append(Slice(action, WORK[action.kind], "blocks.1 attend", since, until))
        return found

    return StepRecord(schedule, tuple(RankRecord(rank, tuple(slices(rank))) for rank in range(schedule.num_ranks)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 5, 12])
def test_a_step_without_overhead_is_its_own_simulation(name: str, microbatches: int) -> None:
    record = ideal_record(build_schedule(name, 4, microbatches))
    expected = simulate(record.schedule, COSTS)
    assert record.duration == pytest.approx(expected.duration)
    assert record.simulated().duration == pytest.approx(expected.duration)
    for times, idle in zip(record.times(), expected.idle, strict=True):
        assert times.bubble == pytest.approx(idle)
        assert times.simulated_bubble == pytest.approx(idle)
        assert times.computing + times.bubble == pytest.approx(record.duration)
        assert times.exposed == 0  # nothing was seen to wait
    shares = record.shares()
    assert shares["bubble"] == pytest.approx(shares["simulated_bubble"]) == pytest.approx(expected.idle_share)


def test_medians_ignore_one_slow_microbatch() -> None:
    record = ideal_record(build_schedule("1f1b", 2, 8))
    first, second = record.ranks
    slow = tuple(
        Slice(s.action, s.work, s.phases, s.start, s.end + 50 * (s.action == Action(0, Kind.FORWARD, 3)))
        for s in first.slices
    )
    costs = StepRecord(record.schedule, (RankRecord(0, slow), second)).costs()
    assert costs.forward == pytest.approx((2.0, 2.0))
    assert costs.backward_input == pytest.approx((2.5, 2.5))
    assert costs.backward_weight == pytest.approx((1.0, 1.0))
    assert costs.overlapped is None


def rank_with_waits() -> RankRecord:
    forward, backward = Action(0, Kind.FORWARD, 0), Action(0, Kind.BACKWARD, 0)
    return RankRecord(
        0,
        (
            Slice(forward, Work.MESSAGE, "", 0.0, 1.0),
            Slice(forward, Work.FORWARD, "", 1.0, 3.0),
            Slice(forward, Work.LAUNCH, "", 2.5, 3.5),  # on a stream of its own: half of it is hidden
            Slice(forward, Work.TOKENS, "", 4.0, 5.0),
            Slice(backward, Work.BACKWARD, "", 5.0, 9.0),
        ),
    )


def test_exposed_is_what_no_computation_covers() -> None:
    rank = rank_with_waits()
    record = StepRecord(build_schedule("1f1b", 1, 1), (rank,))
    (times,) = record.times()
    assert rank.computing == 6.0
    assert rank.exposed == pytest.approx(2.5)
    assert times.bubble == 3.0
    assert [rank.spent(work) for work in (Work.MESSAGE, Work.LAUNCH, Work.TOKENS)] == [1.0, 1.0, 1.0]
    assert record.shares()["exposed_communication"] == pytest.approx(2.5 / 9)


def events_of(path: Path) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Slices and metadata of a trace; what Perfetto asks of each is checked."""
    trace = json.loads(path.read_text())
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    metadata = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert len(slices) + len(metadata) == len(trace["traceEvents"])
    for event in slices:
        assert event.keys() >= {"name", "cat", "pid", "tid", "ts", "dur", "args"}
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
    named = {(e["pid"], e["tid"]) for e in metadata if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in slices} <= named
    assert {e["pid"] for e in slices} == {e["pid"] for e in metadata if e["name"] == "process_name"}
    return slices, metadata


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_trace_of_a_schedule_has_every_step_in_microseconds(name: str) -> None:
    schedule = build_schedule(name, 4, 6)
    slices, _ = events_of(write_schedule_trace(schedule, COSTS, "trace.json"))
    for rank, spans in enumerate(simulate(schedule, COSTS).spans):
        found = [(e["name"], e["ts"], e["dur"]) for e in slices if e["pid"] == rank]
        expected = [("+".join(map(str, step)), 1e3 * start, 1e3 * (end - start)) for step, start, end in spans]
        assert [name for name, *_ in found] == [name for name, *_ in expected]
        assert [times for _, *times in found] == [pytest.approx(times, abs=1e-3) for _, *times in expected]


def test_the_trace_of_a_record_has_three_threads_a_rank() -> None:
    record = StepRecord(build_schedule("1f1b", 1, 1), (rank_with_waits(),))
    slices, metadata = events_of(write_record_trace(record, "trace.json"))
    threads = {e["tid"]: e["args"]["name"] for e in metadata if e["name"] == "thread_name"}  # type: ignore[index]
    by_thread = {name: [e["name"] for e in slices if e["tid"] == tid] for tid, name in threads.items()}
    assert by_thread == {
        "compute": ["0F0", "0B0"],
        "communication": ["0F0 wait for a message", "0F0 launch", "0F0 wait for tokens"],
        "simulated": ["0F0", "0B0"],
    }
    first = next(e for e in slices if e["name"] == "0F0")
    assert (first["ts"], first["dur"]) == (1e6, 2e6)


def test_the_table_has_a_line_for_every_rank() -> None:
    record = ideal_record(build_schedule("dualpipe", 4, 8))
    lines = record_table(record).splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("rank"))
    assert [line.split()[0] for line in lines[at + 1 : at + 5]] == ["0", "1", "2", "3"]
    measured, simulated = lines[at + 1].split()[4:6]
    assert measured == simulated == f"{1e3 * record.times()[0].bubble:.1f}"


@needs("matplotlib")
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_picture_has_lanes_for_every_rank(name: str) -> None:
    record = ideal_record(build_schedule(name, 4, 8))
    picture = draw_record(record, "step.svg").read_text()
    comments = [f"<!-- rank {rank} -->" for rank in range(4)]  # matplotlib's, of each text
    assert all(comment in picture for comment in comments)
    assert picture.count("<!-- simulated -->") == 4
    assert draw_record(record, "step.png").read_bytes().startswith(b"\x89PNG")


@needs("matplotlib")
def test_a_step_in_which_nothing_happened_has_a_table_a_trace_and_a_picture() -> None:
    record = StepRecord(build_schedule("1f1b", 1, 1), (RankRecord(0, ()),))
    assert "bubble 0.0%" in record_table(record)
    assert draw_record(record, "step.png").exists()
    assert write_record_trace(record, "step.json").exists()
