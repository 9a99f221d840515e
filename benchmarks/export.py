"""Host memory and time of ``lightning-dualpipe export``, for a checkpoint directory with the states of AdamW in it.

    python benchmarks/export.py                                       # 1.6 GB of weights, some 2 minutes
    python benchmarks/export.py --width 512 --shard-size 32MB --processes 1 2 4

    largest       of any process, most of its own memory (anonymous, mapped files apart), beyond what imports take
    together      of all processes at one moment, beyond what imports take

Sampled every 20 ms, so what lasts for less may be missed.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.checkpoint.index import Key
from lightning_dualpipe.checkpoint.writer import Contents, Piece, save

IMPORTS = "import lightning_dualpipe.cli.exporting, time; time.sleep(2)"


def write_checkpoint(width: int, target: Path) -> int:
    """As one rank writes it. Returns bytes of weights."""
    shape: Any = {"hidden_size": width, "moe_intermediate_size": width, "intermediate_size": 3 * width}
    module = DeepSeekV3("tiny", {**shape, "num_hidden_layers": 5, "n_routed_experts": 16})
    module.configure_model()
    weights = module.state_dict()
    pieces = [Piece(Key("state_dict", name), tuple(w.shape), 0, w) for name, w in weights.items()]
    trained = [name for name, _ in module.named_parameters()]
    for state in ("exp_avg", "exp_avg_sq"):
        pieces += [
            Piece(Key("optimizer_states.0", name, state), tuple(weights[name].shape), 0, weights[name])
            for name in trained
        ]
    optimizer = {"state": {}, "param_groups": [{"params": list(range(len(trained)))}]}
    content = {"state_dict": {}, "optimizer_states": [optimizer], "optimized_parameters": [[trained]]}
    content |= {"global_step": 1, "hyper_parameters": dict(module.hparams)}
    save(pieces, Contents(content, {name: name for name in weights}, 1, "1 rank"), target, None, rank=0)
    return sum(weight.nbytes for weight in weights.values())


def own_memory(group: int) -> Iterator[int]:
    """Bytes of each process of a process group."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, StopIteration, IndexError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                    lines = (folder / "status").read_text().splitlines()
                    yield int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def watch(command: list[str]) -> tuple[float, int, int]:
    """Seconds, most bytes of one process, most of all together."""
    began, largest, together = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        held = list(own_memory(process.pid))
        largest, together = max([largest, *held]), max(together, sum(held))
        time.sleep(0.02)
    assert process.returncode == 0
    return time.perf_counter() - began, largest, together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1152, help="hidden size (default: %(default)s)")
    parser.add_argument("--shard-size", default="64MB")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "float8_block"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    options = parser.parse_args()
    _, imports, _ = watch([sys.executable, "-c", IMPORTS])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_checkpoint(options.width, Path(folder) / "run.ckpt")
        whole = sum(file.stat().st_size for file in (Path(folder) / "run.ckpt").iterdir())
        print(f"weights {size / 2**20:.0f} MiB, checkpoint {whole / 2**20:.0f} MiB, imports {imports / 2**20:.0f} MiB")
        print("| dtype | processes | largest | together | seconds | load |\n|---|---|---|---|---|---|", flush=True)
        for dtype in options.dtypes:
            for processes in options.processes:
                target = Path(folder) / "served"
                arguments = [str(Path(folder) / "run.ckpt"), str(target), "--dtype", dtype]
                arguments += ["--shard-size", options.shard_size, "--processes", str(processes)]
                arguments += ["--tokenizer", "bytes"]
                command = [sys.executable, "-W", "ignore", "-m", "lightning_dualpipe.cli", "export", *arguments]
                seconds, largest, together = watch(command)
                shutil.rmtree(target)
                beyond = (largest - imports, together - imports * (processes + 1 if processes > 1 else 1))
                mib = " | ".join(f"{number / 2**20:.0f} MiB" for number in beyond)
                print(f"| {dtype} | {processes} | {mib} | {seconds:.0f} | {os.getloadavg()[0]:.0f} |", flush=True)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
