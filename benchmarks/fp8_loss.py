"""Does training in FP8 follow training in bf16 as closely as the report says (arXiv:2412.19437, section 3.3: 0.25 %)?

    python benchmarks/fp8_loss.py                                # trains the quickstart first: about 15 minutes in all
    python benchmarks/fp8_loss.py --checkpoint runs/quickstart/version_0/checkpoints/last.ckpt --json fp8.json

The checkpoint of a trained quickstart is continued for 100 steps on the same text, under DualPipe with two
pipeline ranks times two expert ranks, once for each of

    bf16      precision="bf16-true", float32 main weights
    block     FP8Precision(recipe="block"), the rest as above; on a CPU by the emulation, which is the definition
    current   the same with one scale per tensor, for comparison (--recipes)

and the training losses of each step are compared: (FP8 - bf16) / bf16. They start from one checkpoint, because
trainings from scratch drift apart by themselves: another seed makes a larger difference than FP8 does. A second
bf16 training from weights that were rounded otherwise (--noise) shows how far that goes. Writes fp8_loss.png.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

import lightning_dualpipe

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


@dataclass(frozen=True)
class Comparison:
    """Of one recipe with bf16, over all steps."""

    mean_relative: float  # mean of the differences, with their signs, / mean loss
    mean_deviation: float  # mean of their magnitudes
    largest: float


def compare(losses: Sequence[float], others: Sequence[float]) -> Comparison:
    """``losses`` against ``others``, step by step."""
    relative = [(ours - theirs) / theirs for ours, theirs in zip(losses, others, strict=True)]
    difference = mean(losses) / mean(others) - 1
    return Comparison(difference, mean(map(abs, relative)), max(map(abs, relative)))


def fit(folder: Path, name: str, config: Mapping[str, Any], *, checkpoint: Path | None) -> dict[int, float]:
    """Training loss by step, of a ``lightning-dualpipe fit`` with ``config`` on top of the quickstart's."""
    overlay = folder / f"{name}.yaml"
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder), "name": name}}
    trainer = {"logger": logger, "log_every_n_steps": 1, **config}
    overlay.write_text(yaml.safe_dump({"trainer": trainer}))
    command = [
        sys.executable,
        "-m",
        "lightning_dualpipe.cli",
        "fit",
        "--config",
        str(EXAMPLE),
        "--config",
        str(overlay),
    ]
    if checkpoint is not None:
        command += ["--ckpt_path", str(checkpoint.resolve())]
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    with (folder / name / "version_0" / "metrics.csv").open() as lines:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(lines) if row.get("train_loss")}


def trained(folder: Path) -> Path:
    """The checkpoint that the quickstart leaves."""
    fit(folder, "quickstart", {}, checkpoint=None)
    return folder / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"


def draw(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    base = curves["bf16"]
    for name, curve in curves.items():
        steps = sorted(curve)
        above.plot(steps, [curve[step] for step in steps], label=name, linewidth=1.2)
        if name != "bf16":
            below.plot(steps, [100 * (curve[step] / base[step] - 1) for step in steps], label=name, linewidth=1.2)
    below.axhspan(-0.25, 0.25, alpha=0.15)
    above.set_ylabel("training loss")
    below.set_ylabel("beyond bf16, %")
    below.set_xlabel("step")
    above.legend()
    figure.savefig(path, dpi=120)


def with_noise(checkpoint: Path, path: Path) -> Path:
    """The same checkpoint with every weight off by about one rounding of bfloat16."""
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for value in loaded["state_dict"].values():
        if value.is_floating_point() and value.dim() >= 2:
            value *= 1 + torch.randn(value.shape, generator=generator) * 2.0**-9  # of bfloat16, in which runs compute
    torch.save(loaded, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of a quickstart; default: train one")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipes", nargs="*", default=["block"], help="block, current, mxfp8 (default: block)")
    parser.add_argument("--backend", default="auto", help="auto, te, torch or emulate")
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu, of which four are needed")
    parser.add_argument("--noise", action="store_true", help="a second bf16 training, from slightly other weights")
    parser.add_argument("--picture", type=Path, default=Path("fp8_loss.png"))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = asked.checkpoint or trained(folder)
        last = torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"] + asked.steps
        common = {"max_steps": last, "limit_val_batches": 0, "accelerator": asked.accelerator, "callbacks": []}
        curves = {"bf16": fit(folder, "bf16", {**common, "precision": "bf16-true"}, checkpoint=checkpoint)}
        if asked.noise:
            noisy = with_noise(checkpoint, folder / "noisy.ckpt")
            curves["bf16, rounded otherwise"] = fit(
                folder, "noise", {**common, "precision": "bf16-true"}, checkpoint=noisy
            )
        for recipe in asked.recipes:
            arguments = {"recipe": recipe, "backend": asked.backend}
            plugin = {"class_path": "lightning_dualpipe.FP8Precision", "init_args": arguments}
            curves[recipe] = fit(folder, recipe, {**common, "plugins": [plugin]}, checkpoint=checkpoint)
    base = [curves["bf16"][step] for step in sorted(curves["bf16"])]
    results = {
        name: compare([curve[step] for step in sorted(curve)], base) for name, curve in curves.items() if name != "bf16"
    }
    print(f"\n| {len(base)} steps | mean loss beyond bf16's | mean deviation of a step | largest |\n|---|---|---|---|")
    for name, result in results.items():
        print(f"| {name} | {result.mean_relative:+.3%} | {result.mean_deviation:.3%} | {result.largest:.3%} |")
    print(
        f"\nmean loss in bf16 {mean(base):.4f}; lightning_dualpipe {lightning_dualpipe.__version__}, "
        f"torch {torch.__version__}, python {platform.python_version()}"
    )
    draw(curves, asked.picture)
    if asked.json:
        asked.json.write_text(json.dumps({"losses": curves, "results": {n: vars(r) for n, r in results.items()}}))


if __name__ == "__main__":
    main()
