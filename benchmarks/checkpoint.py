"""What saving costs training: checkpoint directories written at once and in the background, beside one file.

    python benchmarks/checkpoint.py                                   # some 2 minutes
    python benchmarks/checkpoint.py --width 768 --steps 20 --json checkpoint.json

Two ranks train a DeepSeek-V3 with 1f1b and save twice. A nap in every step stands for the device that computes while
the host has nothing to do: without it the thread that writes would take its time from the cores that train, which no
GPU node does.

    step          mean over all steps, those that save included
    waits         what a save takes from training; for the background that is the copy of weights, and what ranks tell
                  rank 0
    write         from the first byte until the directory has its name
    peak          most host memory of a rank, beyond what it had before the first save
"""

import argparse
import json
import logging
import os
import platform
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing as mp

from lightning_dualpipe import DeepSeekV3, DualPipeStrategy, TextDataModule
from lightning_dualpipe.strategy import distributed_saves

WAYS = {"no saving": False, "one file": False, "directory": True, "in background": "async"}


@dataclass(frozen=True)
class Result:
    way: str
    step_seconds: float
    waits_seconds: float  # a save
    write_seconds: float
    checkpoint_bytes: int
    peak_bytes: int  # of the rank that needs most


class Watch(L.Callback):
    """Times of steps, and a save at two of them."""

    def __init__(self, way: str, folder: Path, nap: float, saves: Sequence[int]) -> None:
        self.way, self.folder, self.nap, self.saves = way, folder, nap, saves
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.memory_before = 0
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()
        time.sleep(self.nap)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if self.way != "no saving" and step in self.saves:
            if step == self.saves[0]:
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                self.memory_before = memory("VmRSS")
            began = time.perf_counter()
            trainer.save_checkpoint(self.folder / f"{step}.ckpt")
            self.waits.append(time.perf_counter() - began)
        if step > 2:  # the first steps allocate
            self.steps.append(time.perf_counter() - self._began)


def memory(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def train(rank: int, port: int, way: str, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "benchmark"}
    writes: list[float] = []
    original = distributed_saves.save

    def timed(*args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        original(*args, **kwargs)
        writes.append(time.perf_counter() - began)

    distributed_saves.save = timed
    watch = Watch(way, Path(folder), options.nap, (options.steps // 3, 2 * options.steps // 3))
    strategy = DualPipeStrategy(schedule="1f1b", pipeline_parallel_size=2, save_distributed_checkpoint=WAYS[way])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch],
    )
    shape = {"hidden_size": options.width, "num_hidden_layers": 4, "vocab_size": 264, "n_routed_experts": 8}
    module = DeepSeekV3("tiny", shape)
    trainer.fit(module, TextDataModule(sequence_length=16, batch_size=4))
    saved = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) // len(watch.saves)
    waits = sum(watch.waits) / max(1, len(watch.waits))
    written = sum(writes) / len(writes) if writes else waits
    peak = memory("VmHWM") - watch.memory_before if watch.memory_before else 0
    result = Result(way, sum(watch.steps) / len(watch.steps), waits, written, saved, peak)
    (Path(folder).parent / f"{rank}.json").write_text(json.dumps(asdict(result)))


def measure(way: str, options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        target = Path(folder) / "checkpoints"
        target.mkdir()
        mp.spawn(train, (port, way, str(target), options), nprocs=2)
        ranks = [Result(**json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(2)]
    largest = {name: max(getattr(rank, name) for rank in ranks) for name in list(asdict(ranks[0]))[1:]}
    return Result(way, **largest)


def table(results: Sequence[Result]) -> str:
    base = results[0].step_seconds
    lines = ["| | step | of no saving | waits | of the write | write | checkpoint | peak |", "|---|" + "---|" * 7]
    for each in results:
        share = each.waits_seconds / each.write_seconds if each.write_seconds else 0.0
        lines.append(
            f"| {each.way} | {each.step_seconds:.3f} s | {each.step_seconds / base:.2f} | {each.waits_seconds:.3f} s | "
            f"{share:.1%} | {each.write_seconds:.2f} s | {each.checkpoint_bytes / 2**20:.0f} MiB | "
            f"{each.peak_bytes / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="hidden size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--nap", type=float, default=0.5, help="seconds a step for the device (default: %(default)s)")
    parser.add_argument("--folder", help="where to save (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for way in WAYS:
        results.append(measure(way, options))
        print(f"{way} done, load average {os.getloadavg()[0]:.1f}", flush=True)
    print(f"\n{table(results)}\n")
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
