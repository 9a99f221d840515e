"""How much expert traffic a forward and a backward that run at once hide: ours, in order, and torch's DualPipeV.

    python benchmarks/overlap.py                      # 2 and 4 expert ranks; about 5 minutes
    python benchmarks/overlap.py --json overlap.json --repeats 3 --layers 1 2 4 8

Layers take the times of DeepSeek's published trace, scaled so that a nap is some 50 ms; rows really
cross the ranks over gloo, and each rank's wire carries one thing at a time (``benchmarks/naps.py``).

    pair          a forward and a backward of two microbatches through the same layers
    in order      every layer waits for its own traffic
    exposed       the time beyond compute; hidden = 1 - exposed / traffic
    bound         the larger of compute and traffic: nothing can be faster

The second table is a whole training step of two pipeline ranks times two expert ranks, where only the
pairs of a DualPipe can hide what lone forwards cannot. torch's schedule has pairs as well, but leaves it
to its users to overlap something in them: without that they run one after the other.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

from benchmarks.naps import LAYER_MS, Clock, ExpertLayer, sleep_until
from lightning_dualpipe.interface import Batch, Layer, TensorSpec, WeightGradients, as_layers
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.overlap import ORDERS, run_pair
from lightning_dualpipe.pipeline.partition import partition
from lightning_dualpipe.pipeline.stage import Stage
from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.schedules import build_schedule

ROWS, WIDTH = 8, 16  # of a microbatch: rows cross ranks in equal parts
PIPELINE = 2  # ranks of the whole step


class Model(nn.Module):
    """Layers with experts, and a loss."""

    def __init__(self, num_layers: int, clock: Clock, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ExpertLayer(clock, WIDTH, LAYER_MS, group) for _ in range(num_layers))

    def layers(self) -> Sequence[Layer]:
        return [Layer(str(i), block.phases(), (block,), cost=1) for i, block in enumerate(self.blocks)]

    def inputs(self, batch: Batch) -> Tensor:
        return batch["x"]

    def boundary(self, batch: Batch) -> Sequence[TensorSpec]:
        return [TensorSpec((ROWS, WIDTH))]

    def loss(self, values: tuple[Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": squared_error(*values, batch["labels"]), "tokens": torch.tensor(ROWS)}


def squared_error(x: Tensor, labels: Tensor) -> Tensor:
    return (x.mean(-1) - labels).square().sum()


def build_batches(count: int) -> list[Batch]:
    return [{"x": torch.zeros(ROWS, WIDTH), "labels": torch.zeros(ROWS)} for _ in range(count)]


def our_stage(
    model: Model, layers: Sequence[Layer], index: int, num_stages: int, *, overlap: bool, queue: WeightGradients
) -> Stage:
    for layer in layers:
        for module in layer.modules:
            for part in module.modules():
                if hasattr(part, "weight_gradients"):
                    part.weight_gradients = queue
    return Stage(index, num_stages, model, layers, queue, overlap=overlap)


# ---- what is compared ---------------------------------------------------------------------------


@dataclass
class Case:
    """Something to run on every rank, and on which clock."""

    table: str
    name: str
    layers: int
    ranks: int  # that exchange tokens
    run: Callable[[], object]
    clock: Clock


def pair_cases(num_layers: int, group: dist.ProcessGroup) -> list[Case]:
    def prepared(name: str, order: str | None, lone: str = "") -> Case:
        clock = Clock()
        model = Model(num_layers, clock, group)
        # a stage in the middle of a model: gradients come from outside
        stage = our_stage(model, as_layers(model.layers()), 1, 3, overlap=order is not None, queue=WeightGradients())
        x = torch.zeros(ROWS, WIDTH)

        def once() -> None:
            both = lone or "FB"
            if "B" in both:  # a microbatch to go back with; its forward takes no time
                seconds, clock.seconds = clock.seconds, 0.0
                stage.forward(0, (x,), {})
                clock.reset(seconds)
            forward = stage.forward_steps(1, (x,), {}) if "F" in both else None
            backward = stage.backward_steps(0, (x,), postpone=False) if "B" in both else None
            started = common_start(group)
            if order is None:
                if forward is not None:
                    stage.forward(1, (x,), {})
                    forward = None
                if backward is not None:
                    backward = None
                    stage.backward(0, (x,))
            run_pair(
                forward,
                backward,
                weights=partial(stage.backward_weight, 0),
                forward_done=lambda _: None,
                backward_done=lambda _: None,
                order=ORDERS[order or "eager"],
            )
            stage._held.clear()
            once.seconds = common_end(group) - started  # type: ignore[attr-defined]

        return Case("pair", name, num_layers, group.size(), once, clock)

    return [
        prepared("in order", None),
        prepared("forward alone", "eager", "F"),
        prepared("backward alone", "eager", "B"),
        prepared("pair, traced order", "traced"),
        prepared("pair, eager order", "eager"),
    ]


def step_cases(
    num_layers: int, num_microbatches: int, pipe: dist.ProcessGroup, expert: dist.ProcessGroup
) -> list[Case]:
    """``num_layers`` to a stage; both take two stages on each of two ranks."""

    def ours(overlap: bool) -> Case:
        clock = Clock()
        schedule = build_schedule("dualpipev", PIPELINE, num_microbatches)
        model = Model(num_layers * schedule.num_stages, clock, expert)
        layers = as_layers(model.layers())
        parts = partition(layers, schedule.placement)
        stages = {
            index: our_stage(
                model,
                [layers[position] for position in parts[index]],
                index,
                schedule.num_stages,
                overlap=overlap,
                queue=WeightGradients(),
            )
            for index in schedule.stages_on(pipe.rank())
        }
        engine = Engine(
            model,
            partial(build_schedule, "dualpipev", PIPELINE),
            rank=pipe.rank(),
            stages=stages,
            transport=Transport(pipe, torch.device("cpu")),
            dtype=torch.float32,
        )
        batches = build_batches(num_microbatches)
        name = "dualpipev, overlapped" if overlap else "dualpipev, in order"
        return Case("step", name, num_layers, expert.size(), timed_on_all(lambda: engine.train(batches)), clock)

    def torchs() -> Case:
        clock = Clock()
        route = [*range(PIPELINE), *reversed(range(PIPELINE))]
        model = Model(num_layers * len(route), clock, expert)
        example = torch.zeros(ROWS, WIDTH, requires_grad=True)
        stages = [
            PipelineStage(
                nn.Sequential(*model.blocks[index * num_layers : (index + 1) * num_layers]),
                index,
                len(route),
                torch.device("cpu"),
                input_args=example,
                output_args=example,
                group=pipe,
            )
            for index, place in enumerate(route)
            if place == pipe.rank()
        ]
        schedule = ScheduleDualPipeV(stages, num_microbatches, loss_fn=squared_error)
        x = torch.zeros(ROWS * num_microbatches, WIDTH)
        first = pipe.rank() == 0  # of a V, rank 0 has the first and the last stage

        def step() -> None:
            arguments, target = ((x,), torch.zeros(len(x))) if first else ((), None)
            schedule.step(*arguments, target=target, losses=[] if first else None, return_outputs=False)

        return Case("step", "torch ScheduleDualPipeV", num_layers, expert.size(), timed_on_all(step), clock)

    return [ours(False), torchs(), ours(True)]


def timed_on_all(run: Callable[[], object]) -> Callable[[], object]:
    def once() -> None:
        started = common_start(dist.group.WORLD)
        run()
        once.seconds = common_end(dist.group.WORLD) - started  # type: ignore[attr-defined]

    return once


def common_start(group: Any) -> float:
    start = torch.tensor(time.monotonic() + 0.02, dtype=torch.float64)
    dist.all_reduce(start, op=dist.ReduceOp.MAX, group=group)  # one clock for all processes of a machine
    sleep_until(float(start))
    return float(start)


def common_end(group: Any) -> float:
    end = torch.tensor(time.monotonic(), dtype=torch.float64)
    dist.all_reduce(end, op=dist.ReduceOp.MAX, group=group)
    return float(end)


# ---- measuring ----------------------------------------------------------------------------------


@dataclass
class Row:
    """Seconds, repeat by repeat, and what a rank had to compute and to send in them."""

    table: str
    name: str
    layers: int
    ranks: int
    compute: float = 0.0
    traffic: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)


def measure(rank: int, world: int, rendezvous: str, options: argparse.Namespace, results: str) -> None:
    """On every rank; rank 0 writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(minutes=5))
    cases = [case for layers in options.layers for case in pair_cases(layers, dist.group.WORLD)]
    if world == 4:
        pipes = [dist.new_group([0, 2]), dist.new_group([1, 3])]  # stages on ranks {0, 1} and {2, 3}
        experts = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        cases += step_cases(options.stage_layers, options.microbatches, pipes[rank % 2], experts[rank // 2])
    rows = [Row(case.table, case.name, case.layers, case.ranks) for case in cases]
    unit = options.scale / 1e3
    for case in cases:
        case.clock.reset(0.0)
        case.run()  # connections are made, programs are lowered
    for repeat in range(options.repeats):
        turns = list(zip(cases, rows, strict=True))
        for case, row in turns if repeat % 2 == 0 else turns[::-1]:
            case.clock.reset(unit)
            case.run()
            row.seconds.append(case.run.seconds)  # type: ignore[attr-defined]
            row.compute, row.traffic = case.clock.slept, case.clock.travelled
        if rank == 0:
            print(f"repeat {repeat + 1} of {options.repeats}, load average {os.getloadavg()[0]:.1f}", flush=True)
    if rank == 0:
        Path(results).write_text(json.dumps([vars(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


# ---- reporting ----------------------------------------------------------------------------------


def pair_table(rows: Sequence[Row]) -> str:
    lines = [
        "| expert ranks | layers | | best s | median s | compute s | traffic s | best / bound | hidden | speed-up |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (serial,) = (r for r in rows if (r.ranks, r.layers, r.name) == (row.ranks, row.layers, "in order"))
        bound = max(row.compute, row.traffic)
        hidden = 1 - (row.best - row.compute) / row.traffic
        speed_up = "" if "alone" in row.name else f"{serial.best / row.best:.2f}"
        lines.append(
            f"| {row.ranks} | {row.layers} | {row.name} | {row.best:.3f} | {median(row.seconds):.3f} "
            f"| {row.compute:.3f} | {row.traffic:.3f} | {row.best / bound:.3f} | {hidden:.1%} | {speed_up} |"
        )
    return "\n".join(lines)


def step_table(rows: Sequence[Row]) -> str:
    overlapped = next(row for row in rows if row.name == "dualpipev, overlapped")
    exposed = {row.name: row.best - row.compute for row in rows}
    lines = ["| whole step | best s | median s | waiting s | this / overlapped |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.best:.3f} | {median(row.seconds):.3f} | {exposed[row.name]:.3f} "
            f"| {row.best / overlapped.best:.2f} |"
        )
    serial = next(row for row in rows if row.name == "dualpipev, in order")
    less = 1 - exposed[overlapped.name] / exposed[serial.name]
    lines.append(
        f"\nOverlap leaves {less:.0%} less waiting and gives {serial.best / overlapped.best - 1:.0%} more throughput "
        "than the same schedule in order (known from articles: 80 % less waiting, 20-30 % more throughput)."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=10.0, help="slower than the trace by so much")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8], help="of a pair")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="4 includes the whole step")
    parser.add_argument("--stage-layers", type=int, default=1, help="of each of the four stages of a whole step")
    parser.add_argument("--microbatches", type=int, default=10, help="of a whole step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single measurement")
    options = parser.parse_args()

    rows = []
    load = os.getloadavg()[0]
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            results = f"{folder}/results.json"
            mp.spawn(measure, (world, f"{folder}/rendezvous", options, results), nprocs=world)
            rows += [Row(**row) for row in json.loads(Path(results).read_text())]
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load average before and after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "scale": options.scale,
        "repeats": options.repeats,
    }
    print(f"\n{pair_table([row for row in rows if row.table == 'pair'])}")
    if steps := [row for row in rows if row.table == "step"]:
        print(f"\n{step_table(steps)}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"about": about, "rows": [vars(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
