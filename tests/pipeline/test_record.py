"""What an observer of the engine hears of a step, on one rank and on several."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dualpipe.interface import Batch, Layer, Phase, Values
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.microbatches import split
from lightning_dualpipe.pipeline.record import NOBODY, Recorder
from lightning_dualpipe.schedules import SCHEDULES, Action, Kind, build_schedule
from lightning_dualpipe.schedules.record import RankRecord, Slice, StepRecord, Work
from tests.marks import needs_cuda
from tests.pipeline.small import CPU, Ladder, build_batch, build_engine, gradients_of
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Delayed:
    """A flight that takes its time."""

    values: Values
    seconds: float = 0.003

    def land(self) -> Values:
        time.sleep(self.seconds)
        return self.values

    def back(self, gradients: Values) -> "Delayed":
        return Delayed(gradients, self.seconds)


class Travels(Ladder):
    """After every other rung the activations go round, while the integers and sums that ride along are copied."""

    def layers(self) -> Sequence[Layer | nn.Module]:
        *rungs, penalty, head = super().layers()
        found: list[Layer | nn.Module] = []
        for index, rung in enumerate(rungs):
            found.append(rung)
            if index % 2 == 0:
                phases = (
                    Phase("fly", lambda h_BD: h_BD, launch=lambda *values: Delayed(values), takes=1),
                    Phase("copy", lambda ids_B, total_B: (ids_B, total_B.clone()), skips=1),
                )
                found.append(Layer(f"travel {index}", phases, (), cost=1))
        return [*found, penalty, head]


def record(engine: Engine, batch: Batch, num_microbatches: int, align: Callable[[], None] = lambda: None) -> Recorder:
    recorder = Recorder(CPU, (layer for stage in engine.stages.values() for layer in stage.layers), align)
    engine.observer = recorder
    engine.train(split(batch, num_microbatches))
    return recorder


def on_rank(rank: int, num_ranks: int, num_microbatches: int) -> dict[str, Any]:
    group = dist.new_group()
    found = {}
    for model in (Ladder, Travels):
        for schedule in SCHEDULES:
            batch = build_batch(3 * num_microbatches)
            plain = build_engine(model(), schedule, num_ranks, rank=rank, group=group)
            sums = plain.train(split(batch, num_microbatches))
            watched = build_engine(model(), schedule, num_ranks, rank=rank, group=group)
            recorder = record(watched, batch, num_microbatches, dist.barrier)
            assert same(gradients_of(watched), gradients_of(plain))
            seen = len(recorder.slices())
            again = watched.train(split(batch, num_microbatches))
            assert watched.observer is NOBODY and len(recorder.slices()) == seen
            assert same(again, sums)
            found[f"{model.__name__} {schedule}"] = recorder.schedule, recorder.slices()
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


_RECORDS: dict[str, StepRecord] = {}


@pytest.fixture(params=[f"{model} {schedule}" for model in ("Ladder", "Travels") for schedule in SCHEDULES])
def step(request: pytest.FixtureRequest) -> StepRecord:
    """Of two ranks; all cases share their processes."""
    if not _RECORDS:
        ranks = run_ranks(2, on_rank, 2, 5)
        for name, (schedule, _) in ranks[0].items():
            records = (RankRecord(rank, found[name][1]) for rank, found in enumerate(ranks))
            _RECORDS[name] = StepRecord(schedule, tuple(records))
    return _RECORDS[request.param]


def computed(rank: RankRecord) -> list[Slice]:
    return [piece for piece in rank.slices if piece.work.computes]


def test_every_action_of_the_program_is_seen_in_its_order(step: StepRecord) -> None:
    for rank, program in zip(step.ranks, step.schedule.steps, strict=True):
        steps = {action: index for index, step in enumerate(program) for action in step}
        assert [index for index, _ in groupby(steps[piece.action] for piece in computed(rank))] == list(
            range(len(program))
        )
        assert {piece.action for piece in computed(rank)} == set(steps)
        for action in steps:
            works = {piece.work for piece in computed(rank) if piece.action == action}
            wanted = {Kind.FORWARD: Work.FORWARD, Kind.BACKWARD_WEIGHT: Work.WEIGHTS}.get(action.kind, Work.BACKWARD)
            assert wanted in works
            assert works - {wanted} <= ({Work.WEIGHTS} if action.kind is Kind.BACKWARD else set())


def test_a_host_does_one_thing_at_a_time(step: StepRecord) -> None:
    for rank, times in zip(step.ranks, step.times(), strict=True):
        assert rank.slices[0].start >= 0
        for before, after in pairwise(rank.slices):
            assert before.start <= before.end <= after.start
        assert times.computing == pytest.approx(sum(piece.seconds for piece in computed(rank)))
        assert times.computing + times.bubble == pytest.approx(step.duration)
        assert 0 <= times.exposed <= times.bubble + 1e-9


def test_every_message_that_arrives_is_waited_for_once(step: StepRecord) -> None:
    schedule = step.schedule
    for index, rank in enumerate(step.ranks):
        arriving = {
            action
            for steps in schedule.steps[index]
            for action in steps
            for needed in action.inputs(schedule.num_stages)
            if schedule.rank_of(needed.stage, needed.microbatch) != index
        }
        waited = [piece.action for piece in rank.slices if piece.work is Work.MESSAGE]
        assert sorted(waited) == sorted(arriving)


def test_every_flight_is_launched_and_waited_for() -> None:
    engine = build_engine(Travels(), "dualpipev", 1)
    slices = record(engine, build_batch(8), 4).slices()
    for action in {piece.action for piece in slices} - {
        Action(s, Kind.BACKWARD_WEIGHT, m) for s in (0, 1) for m in range(4)
    }:
        layers = [layer.name for layer in engine.stages[action.stage].layers if layer.name.startswith("travel")]
        order = layers if action.kind is Kind.FORWARD else layers[::-1]
        mine = [piece for piece in slices if piece.action == action]
        for work in (Work.LAUNCH, Work.TOKENS):
            assert [piece.phases for piece in mine if piece.work is work] == [f"{layer} fly" for layer in order]
        assert all(piece.seconds >= 0.003 for piece in mine if piece.work is Work.TOKENS)
        assert [piece.phases for piece in mine if piece.phases.endswith("copy")] == [f"{layer} copy" for layer in order]
    assert sum(piece.seconds for piece in slices if piece.work is Work.TOKENS) > 0


def test_pieces_are_named_after_the_phases_they_run() -> None:
    slices = record(build_engine(Ladder(), "1f1b", 1), build_batch(4), 1).slices()
    assert [piece.phases for piece in slices] == ["0 (Rung) forward … head project"] * 2


class Sleeps(torch.autograd.Function):
    """Work of a known length, whatever else the machine does."""

    @staticmethod
    def forward(ctx: Any, h_BD: Tensor, unit: float) -> Tensor:
        ctx.unit = unit
        time.sleep(unit)
        return h_BD.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.unit)
        return gradient, None


UNIT = 0.04


class Emulated(Ladder):
    def __init__(self) -> None:
        super().__init__(depth=2)

    def layers(self) -> Sequence[Layer | nn.Module]:
        return [
            Layer(str(index), (Phase("work", partial(self._work, rung)),), (rung,), 1)
            for index, rung in enumerate(self.rungs)
        ]

    def _work(self, rung: Any, h_BD: Tensor, ids_B: Tensor, total_B: Tensor) -> Values:
        return Sleeps.apply(h_BD + rung.norm.bias, UNIT), ids_B, total_B  # a parameter: the first stage too goes back

    def loss(self, values: Any, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": values[0].sum(), "tokens": torch.tensor(len(values[0]))}


def emulate(rank: int) -> tuple[Any, tuple[Slice, ...]]:
    engine = build_engine(Emulated(), "1f1b", 2, rank=rank, group=dist.new_group())
    engine.train(split(build_batch(4), 4))  # the first step makes connections
    recorder = record(engine, build_batch(4), 4, dist.barrier)
    return recorder.schedule, recorder.slices()


def test_the_bubble_of_work_of_known_length_is_the_simulated_one() -> None:
    """1F1B on two ranks with four microbatches: 3 of 15 units, at either end."""
    (schedule, first), (_, second) = run_ranks(2, emulate)
    step = StepRecord(schedule, (RankRecord(0, first), RankRecord(1, second)))
    shares = step.shares()
    assert step.duration >= 14.9 * UNIT
    assert shares["simulated_bubble"] == pytest.approx(0.2, abs=0.15)  # what a busy machine adds to some
    assert shares["bubble"] == pytest.approx(shares["simulated_bubble"], abs=0.15)
    assert second[0].work is Work.MESSAGE and second[0].seconds >= 0.5 * UNIT  # its first input is being computed


@needs_cuda
def test_a_gpu_is_timed_in_the_stream_that_works() -> None:
    """The host passes at once; the device sleeps for a known number of its cycles."""
    device = torch.device("cuda")
    recorder = Recorder(device, (), lambda: None)
    recorder.begin(build_schedule("1f1b", 1, 1))
    watch, side = recorder.watch(Action(0, Kind.FORWARD, 0)), torch.cuda.Stream(device)
    before = time.perf_counter()
    with watch(Work.FORWARD, ()):
        torch.cuda._sleep(200_000_000)
    with torch.cuda.stream(side), watch(Work.LAUNCH, ()):
        torch.cuda._sleep(1_000_000)
    with watch(Work.TOKENS, ()):
        torch.cuda.current_stream(device).wait_stream(side)
    host = time.perf_counter() - before
    by_work = {piece.work: piece for piece in recorder.slices()}
    assert by_work[Work.FORWARD].seconds > max(0.05, host)
    assert by_work[Work.LAUNCH].end < by_work[Work.FORWARD].end <= by_work[Work.TOKENS].start
