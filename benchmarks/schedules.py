"""How close a pipeline engine comes to its schedule on paper: ours and those of ``torch.distributed.pipelining``.

    python benchmarks/schedules.py                        # 4 processes, 8 and 16 microbatches, about 6 minutes
    python benchmarks/schedules.py --json schedules.json --repeats 3 --microbatches 16

Compute is emulated: a stage sleeps. So the ideal is known, a core can be shared by several ranks, and
what a step takes beyond it is the engine's: Python, autograd, messages (small ones, over gloo), and
waiting that the schedule does not ask for. A sleep ends late on a busy machine; how late is measured
and shown beside the result ("naps"), for it is no engine's fault, but counts in every figure.

A whole stage, one of as many as ranks, takes one unit each for its forward, its input gradient and
its weight gradient; where a rank has two stages, each takes half of that. A forward and a backward
in a pair gain nothing from each other here.

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
from lightning_dualpipe.interface import Batch, Layer, Phase, TensorSpec, WeightGradients, as_layers, run_uncut
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.forward import PipelinedForward
from lightning_dualpipe.pipeline.partition import partition
from lightning_dualpipe.pipeline.stage import Stage
from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.schedules import Costs, Placement, Schedule, build_schedule, simulate
from lightning_dualpipe.schedules.action import parse_step

RANKS = 4
SAMPLES, TOKENS, WIDTH, VOCABULARY = 2, 8, 16, 32  # of a microbatch; a message is 1 KiB


# ---- compute that takes a known time ------------------------------------------------------------


@dataclass
class Clock:
    """How long a layer takes; how many naps there were so far, and by how much they ended late."""

    seconds: float = 0.0
    naps: int = 0
    late: float = 0.0

    def nap(self) -> None:
        """Sleep coarsely, then in short pieces; never spin, for ranks share cores."""
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(left - 1e-3 if left > 2e-3 else max(left / 2, 5e-5))
        self.naps += 1
        self.late -= left


class Work(torch.autograd.Function):
    """Takes its time forward and for the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock) -> Tensor:
        ctx.clock = clock
        clock.nap()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.clock.nap()
        return grad, None


class Weight(torch.autograd.Function):
    """A weight whose gradient takes its time, now or when the queue is run."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: "Sleeper") -> Tensor:
        ctx.weight, ctx.layer = weight, layer
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        weight, layer = ctx.weight, ctx.layer

        def compute() -> None:
            layer.clock.nap()
            weight.grad = grad if weight.grad is None else weight.grad + grad

        if layer.weight_gradients is not None and layer.weight_gradients.deferring:
            layer.weight_gradients.put(compute)
            return None, None
        layer.clock.nap()
        return grad, None


class Sleeper(nn.Module):
    """x + w, slowly."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self.weight_gradients: WeightGradients | None = None
        self.clock = clock

    def forward(self, x_BTD: Tensor) -> Tensor:
        moved: Tensor = Work.apply(x_BTD, self.clock)
        return moved + Weight.apply(self.weight, self)


class Model(nn.Module):
    """An embedding and a layer for each stage, cut as any other model."""

    def __init__(self, num_stages: int, clock: Clock) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.sleepers = nn.ModuleList(Sleeper(clock) for _ in range(num_stages))

    def layers(self) -> Sequence[Layer]:
        embedding = Layer("embedding", (Phase("embed", self.embedding),), (self.embedding,), cost=0)
        rest = [
            Layer(str(index), (Phase("sleep", sleeper),), (sleeper,), cost=1, with_previous=index == 0)
            for index, sleeper in enumerate(self.sleepers)
        ]
        return [embedding, *rest]

    def inputs(self, batch: Batch) -> Tensor:
        return batch["input_ids"]

    def boundary(self, batch: Batch) -> Sequence[TensorSpec]:
        return [TensorSpec((*batch["input_ids"].shape, WIDTH))]

    def loss(self, values: tuple[Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": squared_error(*values, batch["labels"]), "tokens": torch.tensor(batch["labels"].numel())}

    def forward(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        return run_uncut(self, batch)


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
    costs: Costs  # units of a stage
    clock: Clock
    parameters: Sequence[nn.Parameter]

    @property
    def share(self) -> float:
        """How much of a whole stage one of its stages is."""
        return RANKS / self.on_paper.num_stages

    @property
    def ideal(self) -> float:
        """Units."""
        return simulate(self.on_paper, self.costs).duration * self.share


def ours(name: str, num_microbatches: int, rank: int, group: dist.ProcessGroup) -> Candidate:
    clock, device = Clock(), torch.device("cpu")
    schedule = build_schedule(name, RANKS, num_microbatches)
    model = Model(schedule.num_stages, clock)
    stages = our_stages(model, schedule, rank)
    parameters = [
        parameter
        for stage in stages.values()
        for layer in stage.layers
        for module in layer.modules
        for parameter in module.parameters()
    ]
    engine = Engine(
        model,
        partial(build_schedule, name, RANKS),
        rank=rank,
        stages=stages,
        transport=Transport(group, device),
        dtype=torch.float32,
    )
    forward = PipelinedForward(
        engine, parameters, num_ranks=RANKS, num_microbatches=num_microbatches, device=device, world=dist.group.WORLD
    )
    batch = build_batch(num_microbatches)

    def step() -> None:
        report: Any = forward(batch)
        report["loss"].backward()

    return Candidate(name, num_microbatches, step, schedule, Costs(), clock, parameters)


def our_stages(model: Model, schedule: Schedule, rank: int) -> dict[int, Stage]:
    layers = as_layers(model.layers())
    parts = partition(layers, schedule.num_stages)
    stages = {}
    for index in schedule.stages_on(rank):
        mine, queue = [layers[position] for position in parts[index]], WeightGradients()
        stages[index] = Stage(index, schedule.num_stages, model, mine, queue)
        for module in (module for layer in mine for module in layer.modules if isinstance(module, Sleeper)):
            module.weight_gradients = queue
    return stages


def torchs(name: str, num_microbatches: int, rank: int, group: dist.ProcessGroup) -> Candidate:
    clock = Clock()
    make, route = TORCH[name]
    model = Model(len(route), clock)
    stages = [torch_stage(model, index, group) for index, place in enumerate(route) if place == rank]
    single = make is Schedule1F1B
    schedule: Any = make(stages[0] if single else stages, num_microbatches, loss_fn=squared_error)
    batch = build_batch(num_microbatches)
    arguments = (batch["input_ids"],) if route[0] == rank else ()
    target = batch["labels"] if route[-1] == rank else None

    def step() -> None:
        schedule.step(*arguments, target=target, losses=[] if target is not None else None, return_outputs=False)

    on_paper = build_schedule("1f1b", RANKS, num_microbatches) if single else as_ours(schedule, num_microbatches, route)
    others = [1.0] * (len(route) - 1)
    costs = Costs(backward_input=(0.0, *others), backward_weight=(2.0, *others))
    parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
    return Candidate(name, num_microbatches, step, on_paper, costs, clock, parameters)


def torch_stage(model: Model, index: int, group: dist.ProcessGroup) -> PipelineStage:
    """With its shapes declared, so that none has to be found out by a forward."""
    activation = torch.empty(SAMPLES, TOKENS, WIDTH, requires_grad=True)
    tokens = torch.zeros(SAMPLES, TOKENS, dtype=torch.int64)
    return PipelineStage(
        nn.Sequential(*([model.embedding] if index == 0 else []), model.sleepers[index]),
        index,
        len(model.sleepers),
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


_line = tuple(range(RANKS))
TORCH: dict[str, tuple[Any, tuple[int, ...]]] = {  # name -> schedule, rank of every stage
    "torch 1F1B": (Schedule1F1B, _line),
    "torch InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, _line + _line),
    "torch ZBVZeroBubble": (ScheduleZBVZeroBubble, _line + _line[::-1]),
    "torch DualPipeV": (ScheduleDualPipeV, _line + _line[::-1]),
}
OURS = ("1f1b", "zb1p", "dualpipev", "dualpipe")


# ---- measuring ----------------------------------------------------------------------------------


@dataclass
class Row:
    """What one engine took, in seconds, repeat by repeat."""

    name: str
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
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    taking_turns = [turn for mine, theirs in zip(OURS, TORCH, strict=True) for turn in ((ours, mine), (torchs, theirs))]
    candidates = [
        make(name, num_microbatches, rank, dist.new_group())
        for num_microbatches in options.microbatches
        for make, name in taking_turns
    ]
    unit = options.unit_ms / 1e3
    rows = [Row(each.name, each.num_microbatches, each.ideal * unit) for each in candidates]
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
    clock.seconds, clock.naps, clock.late = unit * candidate.share, 0, 0.0
    start = torch.tensor(time.monotonic() + 0.02, dtype=torch.float64)
    dist.all_reduce(start, op=dist.ReduceOp.MAX)  # one clock for all processes of a machine
    with suppress(ValueError):
        time.sleep(float(start) - time.monotonic())
    candidate.step()
    end = torch.tensor(time.monotonic(), dtype=torch.float64)
    dist.all_reduce(end, op=dist.ReduceOp.MAX)
    naps, late = sums = torch.tensor([clock.naps, clock.late], dtype=torch.float64)
    dist.all_reduce(sums)
    wanted = 3 * candidate.num_microbatches * candidate.on_paper.num_stages
    assert naps == wanted, f"{candidate.name} computed {naps:g} of {wanted} forwards, input and weight gradients"
    return float(end - start), float(late) / RANKS


# ---- reporting ----------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| engine, schedule | microbatches | ideal s | median s | | best s | | of that, naps | step without naps ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.num_microbatches):
        best = min(range(len(row.seconds)), key=row.seconds.__getitem__)
        late = 100 * row.late[best] / row.ideal if row.ideal else float("nan")
        lines.append(
            f"| {row.name} | {row.num_microbatches} | {row.ideal:.3f} "
            f"| {median(row.seconds):.3f} | {row.over(median(row.seconds)):+.1f} % "
            f"| {row.seconds[best]:.3f} | {row.over(row.seconds[best]):+.1f} % "
            f"| {late:.1f} % | {1e3 * median(row.bare):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit-ms", type=float, default=100.0, help="a whole stage's forward, I or W")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single measurement")
    options = parser.parse_args()

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/results.json"
        mp.spawn(measure, (f"{folder}/rendezvous", options, results), nprocs=RANKS)
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
