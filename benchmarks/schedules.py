"""How close a pipeline engine comes to its schedule on paper: ours and those of ``torch.distributed.pipelining``.

    python benchmarks/schedules.py                        # 4 processes, 8 and 16 microbatches, about 6 minutes
    python benchmarks/schedules.py --traffic              # expert traffic, which pairs hide
    python benchmarks/schedules.py --traffic --ranks 8 --microbatches 16 32 --repeats 3 --json schedules.json

Compute is emulated: a stage sleeps. So the ideal is known, a core can be shared by several ranks, and
what a step takes beyond it is the engine's: Python, autograd, messages (small ones, over gloo), and
waiting that the schedule does not ask for. A sleep ends late on a busy machine; how late is measured
and shown beside the result ("naps"), for it is no engine's fault, but counts in every figure.

A whole stage, one of as many as ranks, takes one unit each for its forward, its input gradient and
its weight gradient; where a rank has two stages, each takes half of that. Without ``--traffic`` a
forward and a backward in a pair gain nothing from each other.

With it, a stage is two layers with experts, and each forward and each input gradient has as much traffic
as compute (``benchmarks/naps.py``). A pair hides it, and a lone backward hides some of it behind its weight
gradients; what that makes on paper is found by running our stages on a clock on which nothing else takes
time. torch's DualPipeV leaves it to its users to overlap a pair, and comes twice: as it is, and with pairs
that sleep for as long as ours take on paper.

Each engine is compared with the simulation of its own schedule. Ours runs as in training: split the
batch, run, sum the losses over all ranks, deliver the gradients. Torch's engines split backwards in
their own way; of the first stage they postpone the whole backward, and are simulated so. Ours and
theirs take turns in one run, and ranks start each step at an agreed moment.
"""

import argparse
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

import lightning_dualpipe
from benchmarks.naps import Clock, ExpertLayer, LayerTimes, Sleeper
from lightning_dualpipe.interface import Batch, Layer, Phase, TensorSpec, WeightGradients, as_layers, run_uncut
from lightning_dualpipe.parallel.early_sums import GradientSums
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.forward import PipelinedForward
from lightning_dualpipe.pipeline.overlap import ORDERS, run_pair
from lightning_dualpipe.pipeline.partition import partition
from lightning_dualpipe.pipeline.stage import Stage
from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.schedules import Action, Costs, Kind, Placement, Schedule, build_schedule, simulate
from lightning_dualpipe.schedules.action import parse_step

SAMPLES, TOKENS, WIDTH, VOCABULARY = 2, 8, 16, 32  # of a microbatch; a message is 1 KiB


# ---- a model that sleeps --------------------------------------------------------------------------


class Model(nn.Module):
    """An embedding, and one or two layers for each stage, cut as any other model."""

    def __init__(self, num_stages: int, num_ranks: int, clock: Clock, *, traffic: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        part = num_ranks / num_stages  # of a whole stage
        self.parts = nn.ModuleList(
            nn.Sequential(*(ExpertLayer(clock, WIDTH, HALF_A_STAGE, None) for _ in range(round(2 * part))))
            if traffic
            else nn.Sequential(Sleeper(clock, WIDTH, part, part, part))
            for _ in range(num_stages)
        )

    def layers(self) -> Sequence[Layer]:
        embedding = Layer("embedding", (Phase("embed", self.embedding),), (self.embedding,), cost=0)
        rest = [
            Layer(str(index), self._phases(part), (part,), cost=1, with_previous=index == 0)
            for index, part in enumerate(self.parts)
        ]
        return [embedding, *rest]

    @staticmethod
    def _phases(part: nn.Module) -> tuple[Phase, ...]:
        layers = [layer.phases() if isinstance(layer, ExpertLayer) else (Phase("sleep", layer),) for layer in part]
        return tuple(phase for phases in layers for phase in phases)

    def inputs(self, batch: Batch) -> Tensor:
        return batch["input_ids"]

    def boundary(self, batch: Batch) -> Sequence[TensorSpec]:
        return [TensorSpec((*batch["input_ids"].shape, WIDTH))]

    def loss(self, values: tuple[Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": squared_error(*values, batch["labels"]), "tokens": torch.tensor(batch["labels"].numel())}

    def forward(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        return run_uncut(self, batch)


_QUARTER = (0.25, 0.25, 0.25)
HALF_A_STAGE = LayerTimes(attention=_QUARTER, experts=_QUARTER, dispatch=(0.25, 0.25), combine=(0.25, 0.25))


def in_one_queue(layers: Sequence[Layer]) -> WeightGradients:
    """Weight gradients of all sleepers of a stage."""
    queue = WeightGradients()
    for part in (part for layer in layers for module in layer.modules for part in module.modules()):
        if isinstance(part, Sleeper):
            part.weight_gradients = queue
    return queue


def on_paper(num_stages: int, num_ranks: int, *, traffic: bool) -> Costs:
    """What a stage of ours takes in units: its steps on a clock on which nothing else takes time."""
    clock = Clock(virtual=True)
    model = Model(num_stages, num_ranks, clock, traffic=traffic)
    layers = as_layers(model.layers())[2:3]
    stage, x = Stage(1, 3, model, layers, in_one_queue(layers)), torch.zeros(SAMPLES, TOKENS, WIDTH)

    def units(run: Callable[[], object]) -> float:
        clock.reset(1.0)
        start = clock.now
        run()
        return clock.now - start

    def together(forward: bool, backward: bool) -> None:
        run_pair(
            stage.forward_steps(1, (x,), {}) if forward else None,
            stage.backward_steps(0, (x,), postpone=False) if backward else None,
            weights=partial(stage.backward_weight, 0),
            forward_done=lambda _: None,
            backward_done=lambda _: None,
            order=ORDERS["eager"],
        )

    stage.forward(0, (x,), {})
    pair = units(lambda: together(True, True))
    stage.forward(0, (x,), {})
    return Costs(
        backward=units(lambda: together(False, True)),
        forward=units(lambda: stage.forward(0, (x,), {})),
        backward_input=units(lambda: stage.backward_input(0, (x,))),
        backward_weight=units(lambda: stage.backward_weight(0)),
        overlapped=pair,
    )


def squared_error(x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    return (x_BTD.mean(-1) - labels_BT).square().sum()


def build_batch(num_microbatches: int) -> dict[str, Tensor]:
    shape = (SAMPLES * num_microbatches, TOKENS)
    tokens, labels = torch.randint(VOCABULARY, (2, *shape), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": labels}


# ---- the engines --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One engine with one schedule, ready to run on this rank."""

    name: str
    num_microbatches: int
    step: Callable[[], object]
    on_paper: Schedule
    costs: Costs  # units
    clock: Clock
    parameters: Sequence[nn.Parameter]
    naps_of_a_stage: int

    @property
    def ideal(self) -> float:
        """Units."""
        return simulate(self.on_paper, self.costs).duration


def ours(name: str, num_microbatches: int, rank: int, group: dist.ProcessGroup, traffic: bool) -> Candidate:
    clock, device, ranks = Clock(), torch.device("cpu"), group.size()
    schedule = build_schedule(name, ranks, num_microbatches)
    model = Model(schedule.num_stages, ranks, clock, traffic=traffic)
    layers = as_layers(model.layers())
    stages = {}
    for index in schedule.stages_on(rank):
        mine = [layers[position] for position in partition(layers, schedule.placement)[index]]
        stages[index] = Stage(index, schedule.num_stages, model, mine, in_one_queue(mine))
    modules = [module for stage in stages.values() for layer in stage.layers for module in layer.modules]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    named = {f"rank {rank}, {index}": parameter for index, parameter in enumerate(parameters)}
    alone = ReplicaGroups(dict.fromkeys(named, (rank,)), rank=rank)  # how long sums take is no question here
    engine = Engine(
        model,
        partial(build_schedule, name, ranks),
        rank=rank,
        stages=stages,
        transport=Transport(group, device),
        dtype=torch.float32,
    )
    forward = PipelinedForward(
        engine,
        lambda: named,
        GradientSums(alone, lambda: named, dict.fromkeys(named, (0,)), here=(0,)),
        num_ranks=ranks,
        num_microbatches=num_microbatches,
        device=device,
        world=dist.group.WORLD,
    )
    batch = build_batch(num_microbatches)

    def step() -> None:
        report: Any = forward(batch)
        report["loss"].backward()

    costs = on_paper(schedule.num_stages, ranks, traffic=traffic)
    return Candidate(name, num_microbatches, step, schedule, costs, clock, parameters, naps_of_a_stage(model))


def naps_of_a_stage(model: Model) -> int:
    """Forwards, input and weight gradients."""
    return 3 * sum(isinstance(module, Sleeper) for module in model.parts[0].modules())


def torchs(name: str, num_microbatches: int, rank: int, group: dist.ProcessGroup, traffic: bool) -> Candidate:
    clock, ranks = Clock(), group.size()
    make, route = TORCH[name][0], TORCH[name][1](ranks)
    model = Model(len(route), ranks, clock, traffic=traffic)
    stages = [torch_stage(model, index, group) for index, place in enumerate(route) if place == rank]
    single = make is Schedule1F1B
    schedule: Any = make(stages[0] if single else stages, num_microbatches, loss_fn=squared_error)
    batch = build_batch(num_microbatches)
    arguments = (batch["input_ids"],) if route[0] == rank else ()
    target = batch["labels"] if route[-1] == rank else None

    def step() -> None:
        schedule.step(*arguments, target=target, losses=[] if target is not None else None, return_outputs=False)

    paper = build_schedule("1f1b", ranks, num_microbatches) if single else as_ours(schedule, num_microbatches, route)
    pair = on_paper(len(route), ranks, traffic=traffic).overlapped if name.endswith(OVERLAPPED) else None
    costs = in_order(len(route), ranks, traffic=traffic, pair=pair)
    if pair is not None:
        hurry_in_pairs(paper, stages, clock, pair / (costs.of(parse_step("1F0")) + costs.of(parse_step("1B0"))))
    parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
    return Candidate(name, num_microbatches, step, paper, costs, clock, parameters, naps_of_a_stage(model))


def in_order(num_stages: int, num_ranks: int, *, traffic: bool, pair: Any) -> Costs:
    """Torch's stages wait for their traffic; the first postpones the whole of a split backward."""
    part, others = num_ranks / num_stages, num_stages - 1
    waits = part * (2 if traffic else 1)
    return Costs(
        forward=waits,
        backward_input=(0.0, *[waits] * others),
        backward_weight=(part + waits, *[part] * others),
        overlapped=pair,
    )


def hurry_in_pairs(schedule: Schedule, stages: Sequence[PipelineStage], clock: Clock, factor: float) -> None:
    """Let the two of a pair, one after the other, take together what a pair takes that overlaps."""
    paired = {action for steps in schedule.steps for step in steps if len(step) == 2 for action in step}

    def hurrying(stage: PipelineStage, kind: Kind, run: Callable[..., Any]) -> Callable[..., Any]:
        def at_its_pace(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            pace = clock.pace
            clock.pace = factor if Action(stage.stage_index, kind, microbatch) in paired else 1.0
            try:
                return run(microbatch, *args, **kwargs)
            finally:
                clock.pace = pace

        return at_its_pace

    for stage in stages:
        stage.forward_one_chunk = hurrying(stage, Kind.FORWARD, stage.forward_one_chunk)
        stage.backward_one_chunk = hurrying(stage, Kind.BACKWARD, stage.backward_one_chunk)


def torch_stage(model: Model, index: int, group: dist.ProcessGroup) -> PipelineStage:
    """With its shapes declared, so that none has to be found out by a forward."""
    activation = torch.empty(SAMPLES, TOKENS, WIDTH, requires_grad=True)
    tokens = torch.zeros(SAMPLES, TOKENS, dtype=torch.int64)
    return PipelineStage(
        nn.Sequential(*([model.embedding] if index == 0 else []), model.parts[index]),
        index,
        len(model.parts),
        torch.device("cpu"),
        input_args=tokens if index == 0 else activation,
        output_args=activation,
        group=group,
    )


def as_ours(schedule: Any, num_microbatches: int, route: tuple[int, ...]) -> Schedule:
    """Torch's order of actions, by rank: ``3F7`` there as here, and pairs as ``(3F7;0B2)OVERLAP_F_B``."""
    steps = tuple(
        tuple(parse_step("+".join(re.findall(r"\d+[FBIW]\d+", str(action)))) for action in actions if action)
        for _, actions in sorted(schedule.pipeline_order.items())
    )
    return Schedule(type(schedule).__name__, num_microbatches, Placement((route,)), steps)


def line(ranks: int) -> tuple[int, ...]:
    return tuple(range(ranks))


def loop(ranks: int) -> tuple[int, ...]:
    return line(ranks) + line(ranks)


def vee(ranks: int) -> tuple[int, ...]:
    return line(ranks) + line(ranks)[::-1]


OVERLAPPED = ", pairs overlapped"
TORCH: dict[str, tuple[Any, Callable[[int], tuple[int, ...]]]] = {  # name -> schedule, rank of every stage
    "torch 1F1B": (Schedule1F1B, line),
    "torch InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, loop),
    "torch ZBVZeroBubble": (ScheduleZBVZeroBubble, vee),
    "torch DualPipeV": (ScheduleDualPipeV, vee),
    f"torch DualPipeV{OVERLAPPED}": (ScheduleDualPipeV, vee),
}
OURS = ("1f1b", "zb1p", "dualpipev", "dualpipe")


# ---- measuring ----------------------------------------------------------------------------------


@dataclass
class Row:
    """What one engine took, in seconds, repeat by repeat."""

    name: str
    num_ranks: int
    num_microbatches: int
    ideal: float
    seconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # naps, summed over a rank's step; the mean of the ranks
    bare: list[float] = field(default_factory=list)  # the same step with naps of no length

    def over(self, seconds: float) -> float:
        """Percent above the ideal."""
        return 100 * (seconds / self.ideal - 1) if self.ideal else float("nan")


def measure(rank: int, rendezvous: str, options: argparse.Namespace, results: str) -> None:
    """On every rank; rank 0 writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{rendezvous}", rank=rank, world_size=options.ranks, timeout=timedelta(minutes=5)
    )
    theirs = [name for name in TORCH if options.traffic or not name.endswith(OVERLAPPED)]
    taking_turns = [turn for pair in zip_longest(OURS, theirs) for turn in zip((ours, torchs), pair, strict=True)]
    candidates = [
        make(name, num_microbatches, rank, dist.new_group(), options.traffic)
        for num_microbatches in options.microbatches
        for make, name in taking_turns
        if name is not None
    ]
    unit = options.unit_ms / 1e3
    rows = [Row(each.name, options.ranks, each.num_microbatches, each.ideal * unit) for each in candidates]
    for each in candidates:
        timed(each, 0.0)  # connections are made, programs are lowered
    for repeat in range(options.repeats):
        order = list(zip(candidates, rows, strict=True))
        for each, row in order if repeat % 2 == 0 else order[::-1]:
            row.bare.append(timed(each, 0.0)[0])
            seconds, late = timed(each, unit)
            row.seconds.append(seconds)
            row.late.append(late)
        if rank == 0:
            print(f"repeat {repeat + 1} of {options.repeats}, load average {os.getloadavg()[0]:.1f}", flush=True)
    if rank == 0:
        Path(results).write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


def timed(candidate: Candidate, unit: float) -> tuple[float, float]:
    """Seconds from the common start until the last rank is done, and by how much a rank's naps were late."""
    for parameter in candidate.parameters:
        parameter.grad = None
    clock = candidate.clock
    clock.reset(unit)
    start = torch.tensor(time.monotonic() + 0.02, dtype=torch.float64)
    dist.all_reduce(start, op=dist.ReduceOp.MAX)  # one clock for all processes of a machine
    with suppress(ValueError):
        time.sleep(float(start) - time.monotonic())
    candidate.step()
    end = torch.tensor(time.monotonic(), dtype=torch.float64)
    dist.all_reduce(end, op=dist.ReduceOp.MAX)
    naps, late = sums = torch.tensor([clock.naps, clock.late], dtype=torch.float64)
    dist.all_reduce(sums)
    wanted = candidate.naps_of_a_stage * candidate.num_microbatches * candidate.on_paper.num_stages
    assert naps == wanted, f"{candidate.name} computed {naps:g} of {wanted} forwards, input and weight gradients"
    return float(end - start), float(late) / dist.get_world_size()


# ---- reporting ----------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| engine, schedule | ranks | microbatches | ideal s | median s | | best s | | of that, naps | without naps ms "
        "| this / our dualpipe |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    fastest = {row.num_microbatches: min(row.seconds) for row in rows if row.name == "dualpipe"}
    for row in sorted(rows, key=lambda row: row.num_microbatches):
        best = min(range(len(row.seconds)), key=row.seconds.__getitem__)
        late = 100 * row.late[best] / row.ideal if row.ideal else float("nan")
        lines.append(
            f"| {row.name} | {row.num_ranks} | {row.num_microbatches} | {row.ideal:.3f} "
            f"| {median(row.seconds):.3f} | {row.over(median(row.seconds)):+.1f} % "
            f"| {row.seconds[best]:.3f} | {row.over(row.seconds[best]):+.1f} % "
            f"| {late:.1f} % | {1e3 * median(row.bare):.0f} | {min(row.seconds) / fastest[row.num_microbatches]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit-ms", type=float, default=100.0, help="a whole stage's forward, I or W")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4, help="of the pipeline; an even number")
    parser.add_argument("--traffic", action="store_true", help="layers with experts, whose traffic a pair hides")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single measurement")
    options = parser.parse_args()

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/results.json"
        mp.spawn(measure, (f"{folder}/rendezvous", options, results), nprocs=options.ranks)
        rows = [Row(**row) for row in json.loads(Path(results).read_text())]
    about = {
        "lightning_dualpipe": lightning_dualpipe.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load average before and after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "unit in ms": options.unit_ms,
        "repeats": options.repeats,
    }
    print(f"\n{table(rows)}\n\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
