"""How much faster a DeepSeek-V3 block is in FP8 on one GPU: bfloat16, Transformer Engine and torch alone.

    PYTHONPATH=. python benchmarks/fp8_gpu.py                    minutes; what cannot run here is named, and left out
    PYTHONPATH=. python benchmarks/fp8_gpu.py --only experts --experts 8 --json fp8.json
    PYTHONPATH=. python benchmarks/fp8_gpu.py --device cpu --tiny      all of this code, in seconds, by emulation

block      one layer of the 671B model, hidden 7168, 128 heads, with as many routed experts as fit (32, of which a
           token uses 8): forward and backward of one sequence
experts    its routed experts alone, with as many rows for each as the block gives them on average, unevenly

As in a pipeline: bfloat16 weights, float32 gradients that add up in place, ``--microbatches`` between two steps
of an optimizer (which is not there), so quantising a weight is shared by so many. Recipe ``block``: 1 x 128 and
128 x 128 tiles, E4M3, powers of two. Attention projections, shared and routed experts are in FP8; router, norms
and the attention core are not, and bound what the whole can gain. Implementations alternate, step by step; CUDA
events, medians; "x bf16" is the median over neighbouring steps. FLOPs as in ``model_gpu.py``.

The measured peaks are those of a plain 8192 x 8192 x 8192 product, by cuBLAS, in bfloat16 and in FP8 with one
scale per tensor: what this chip gives, under its clocks and power, to a product that nothing disturbs.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.model_gpu import DTYPE, WARM_UP, configs, our_block, size, where
from lightning_dualpipe.deepseek_v3.count import forward_flops
from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.deepseek_v3.init import initialize
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.convert import convert
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.linear import make_linears_deferrable
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from lightning_dualpipe.precision.matmul import Backend
from lightning_dualpipe.precision.recipe import Block
from lightning_dualpipe.precision.te_backend import TEBackend, why_not_te
from lightning_dualpipe.precision.torch_backend import TorchBackend, why_not_torch

RECIPE = Block()


@dataclass(frozen=True)
class Times:
    """Seconds of one step: so many microbatches."""

    forward: float
    backward: float

    @property
    def whole(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Figure:
    milliseconds: float  # of one microbatch, forward and backward
    forward_tflops: float
    backward_tflops: float
    tflops: float
    of_bf16: float  # how many times as fast
    of_bf16_peak: float | None  # the measured one
    peak_gb: float | None


@dataclass(frozen=True)
class Subject:
    name: str
    parameters: int
    tokens: int
    flops: float  # of one forward; a backward takes twice as many
    steps: Mapping[str, Callable[[], Times]]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this measures a CUDA device and torch sees none here; --device cpu --tiny only runs the code")
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    found, missing = backends(device)
    result: dict[str, Any] = {"settings": vars(arguments), "where": where(device), "versions": versions()}
    print(result["where"], *(f"{name} {number}" for name, number in result["versions"].items()), sep=", ")
    for reason in missing:
        print(f"left out: {reason}")
    result["left_out"] = missing
    result["measured_peak_tflops"] = peaks = measured_peaks(device, 256 if arguments.tiny else 8192)
    print("measured peaks, TFLOP/s:", ", ".join(f"{name} {value:,.4g}" for name, value in peaks.items()))
    builders = {"block": block_subject, "experts": experts_subject}
    for name in arguments.only or builders:
        subject = builders[name](arguments, device, found)
        times, memory = measure(subject.steps, arguments.steps, device)
        figures = figures_of(subject, times, memory, arguments.microbatches, peaks.get("bf16"))
        print(table(subject, figures))
        described = {"parameters": subject.parameters, "tokens": subject.tokens, "flops": 3 * subject.flops}
        result[name] = {**described, **{each: asdict(figure) for each, figure in figures.items()}}
        del subject  # before the next one takes memory
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for trying the code")
    parser.add_argument("--only", choices=("block", "experts"), action="append")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--microbatches", type=int, default=4, help="between two steps of the optimizer")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=32, help="routed experts")
    parser.add_argument("--json")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.sequence_length, arguments.steps, arguments.microbatches = 32, 2, 2
    return arguments


def backends(device: torch.device) -> tuple[dict[str, Backend | None], list[str]]:
    """By name, bfloat16 first, and why others are not among them."""
    found: dict[str, Backend | None] = {"bf16": None}
    if device.type != "cuda":
        found["emulate"] = EmulateBackend(RECIPE)
        return found, ["te-block and torch-block, which need a CUDA device"]
    missing = []
    kinds = (("te-block", why_not_te, TEBackend), ("torch-block", why_not_torch, TorchBackend))
    for name, why_not, kind in kinds:
        if (refused := why_not(RECIPE)) is None:
            found[name] = kind(RECIPE)
        else:
            missing.append(f"{name}: {refused}")
    return found, missing


def versions() -> dict[str, str]:
    """Besides those that ``where`` names."""
    found = {"CUDA of torch": torch.version.cuda or "none"}
    for package in ("transformer_engine", "nvidia-cublas"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# ---- what is measured -------------------------------------------------------------------------


def block_subject(arguments: argparse.Namespace, device: torch.device, found: Mapping[str, Backend | None]) -> Subject:
    config = configs(tiny=arguments.tiny, experts=arguments.experts)["block"]
    shape = (1, arguments.sequence_length, config.hidden_size)
    x, grad = (torch.randn(shape, device=device, dtype=DTYPE) for _ in range(2))
    original = our_block(config, device)

    def run(block: nn.Module, h: Tensor) -> Tensor:
        return block(h, h.new_zeros(1, dtype=torch.float32))[0]

    steps = {name: step_of(original, backend, run, x, grad, arguments) for name, backend in found.items()}
    flops = forward_flops(config, arguments.sequence_length).moe_block * arguments.sequence_length
    name = f"block of {config.n_routed_experts} experts"
    return Subject(name, size(original), arguments.sequence_length, flops, steps)


def experts_subject(
    arguments: argparse.Namespace, device: torch.device, found: Mapping[str, Backend | None]
) -> Subject:
    config = configs(tiny=arguments.tiny, experts=arguments.experts)["block"]
    hidden, intermediate, number = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    counts = uneven_counts(arguments.sequence_length * config.num_experts_per_tok, number)
    rows = sum(counts)
    x, grad = (torch.randn(rows, hidden, device=device, dtype=DTYPE) for _ in range(2))
    original = Experts(number, hidden, intermediate).to(device, DTYPE)
    initialize(original, seed=0, std=config.initializer_range)
    weights, counts_E = torch.rand(rows, device=device), torch.tensor(counts, device=device)

    def run(experts: nn.Module, x_RD: Tensor) -> Tensor:
        return experts(x_RD, weights, counts_E)

    steps = {name: step_of(original, backend, run, x, grad, arguments) for name, backend in found.items()}
    return Subject(f"{number} experts", size(original), rows, 2 * 3 * hidden * intermediate * rows, steps)


def uneven_counts(rows: int, number: int) -> list[int]:
    """Between half and one and a half of the average, no multiples of anything; all rows."""
    shares = torch.linspace(0.5, 1.5, number, dtype=torch.float64)
    counts = (shares * rows / number).int().tolist()
    counts[-1] += rows - sum(counts)
    return counts


def step_of(
    original: nn.Module,
    backend: Backend | None,
    run: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    grad: Tensor,
    arguments: argparse.Namespace,
) -> Callable[[], Times]:
    """The same weights for each; gradients are in float32, and nobody waits for an optimizer."""
    module, queue = copy.deepcopy(original), WeightGradients()
    if backend is not None:
        names = convert(module, backend, lambda name, layer: True)
        assert names, "nothing is converted"
    make_linears_deferrable(module, queue)
    keep_main_gradients(module.parameters())
    return partial(step, module, backend, run, x, grad, arguments.microbatches)


def step(
    module: nn.Module,
    backend: Backend | None,
    run: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    grad: Tensor,
    microbatches: int,
) -> Times:
    module.zero_grad(set_to_none=True)
    if backend is not None:
        backend.weights_changed()
    clock = Clock(x.device)
    for _ in range(microbatches):
        leaf = x.detach().requires_grad_()  # a block in a model passes a gradient on
        clock.begin()
        out = run(module, leaf)
        clock.lap("forward")
        out.backward(grad)
        clock.lap("backward")
    return Times(**clock.seconds())


class Clock:
    """Laps of a device. It is asked for them once at the end, so nobody waits between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None
        self._laps: list[tuple[str, Any, Any]] = []

    def begin(self) -> None:
        self._last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self._laps.append((name, self._last, now))
        self._last = now

    def seconds(self) -> dict[str, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total: dict[str, float] = {}
        for name, begin, end in self._laps:
            taken = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            total[name] = total.get(name, 0.0) + taken
        return total

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


# ---- how --------------------------------------------------------------------------------------


def measured_peaks(device: torch.device, width: int, repeats: int = 20) -> dict[str, float]:
    """TFLOP/s of the fastest of several products, by number format."""
    a, b = (torch.randn(width, width, device=device, dtype=DTYPE) for _ in range(2))
    products: dict[str, Callable[[], object]] = {"bf16": lambda: a @ b.mT}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one, whole = torch.ones((), device=device), F.ScalingType.TensorWise
        products["fp8"] = lambda: F.scaled_mm(a8, b8.t(), one, whole, one, whole, output_dtype=DTYPE)
    best = dict.fromkeys(products, float("inf"))
    for _ in range(WARM_UP + repeats):
        for name, product in products.items():
            clock = Clock(device)
            clock.begin()
            product()
            clock.lap("product")
            best[name] = min(best[name], clock.seconds()["product"])
    return {name: 2 * width**3 / seconds / 1e12 for name, seconds in best.items()}


def measure(
    steps: Mapping[str, Callable[[], Times]], repeats: int, device: torch.device
) -> tuple[dict[str, list[Times]], dict[str, float | None]]:
    """Times of each step, and the most bytes that were allocated during one."""
    times: dict[str, list[Times]] = {name: [] for name in steps}
    memory: dict[str, float | None] = dict.fromkeys(steps)
    for index in range(WARM_UP + repeats):
        for name, run in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = run()
            if index >= WARM_UP:
                times[name].append(taken)
                if device.type == "cuda":
                    memory[name] = max(memory[name] or 0.0, torch.cuda.max_memory_allocated(device))
    return times, memory


def figures_of(
    subject: Subject,
    times: Mapping[str, Sequence[Times]],
    memory: Mapping[str, float | None],
    microbatches: int,
    peak: float | None,
) -> dict[str, Figure]:
    figures = {}
    for name, each in times.items():
        forward, backward, whole = (
            statistics.median(getattr(taken, part) for taken in each) / microbatches
            for part in ("forward", "backward", "whole")
        )
        rate = 3 * subject.flops / whole / 1e12
        bytes_held = memory[name]
        figures[name] = Figure(
            milliseconds=whole * 1e3,
            forward_tflops=subject.flops / forward / 1e12,
            backward_tflops=2 * subject.flops / backward / 1e12,
            tflops=rate,
            of_bf16=statistics.median(a.whole / b.whole for a, b in zip(times["bf16"], each, strict=True)),
            of_bf16_peak=rate / peak if peak else None,
            peak_gb=None if bytes_held is None else bytes_held / 1e9,
        )
    return figures


def table(subject: Subject, figures: Mapping[str, Figure]) -> str:
    lines = [
        f"\n{subject.name}: {subject.parameters:,} parameters, {subject.tokens:,} rows, "
        f"{3 * subject.flops / 1e12:,.3g} TFLOP forward and backward",
        f"{'':14}{'ms':>10}{'forward':>10}{'backward':>10}{'TFLOP/s':>10}{'x bf16':>8}{'of peak':>9}{'GB, all':>10}",
    ]
    for name, each in figures.items():
        share = "-" if each.of_bf16_peak is None else f"{each.of_bf16_peak:.1%}"
        memory = "-" if each.peak_gb is None else f"{each.peak_gb:.1f}"
        lines.append(
            f"{name:14}{each.milliseconds:>10.2f}{each.forward_tflops:>10.4g}{each.backward_tflops:>10.4g}"
            f"{each.tflops:>10.4g}{each.of_bf16:>8.2f}{share:>9}{memory:>10}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
