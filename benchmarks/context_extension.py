"""Extending the context in small: examples/context_extension/tiny_*.yaml, and the same without YaRN.

    python benchmarks/context_extension.py                            # some 10 minutes on two idle cores
    python benchmarks/context_extension.py --folder kept --json context.json

Runs the commands that the examples name: a model is trained on sequences of 128 bytes, exported, continued on 512,
exported, continued on 2048. Then each model reads held-out sequences of 2048 bytes, and the loss of a byte is averaged
by its position: beyond the length a model was trained on it shows what its rotary embedding is worth there. A sequence
may hold several documents, so that the position is not that in a document; it is the same for all models.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from lightning_dualpipe import DeepSeekV3, TextDataModule

EXAMPLES = Path(__file__).parent.parent / "examples" / "context_extension"
LENGTHS = (128, 512, 2048)
WITHOUT = {"max_position_embeddings": 2560, "rope_scaling": None}


def command(folder: Path, *args: str) -> None:
    root = str(EXAMPLES.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_dualpipe.cli", *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"lightning-dualpipe {' '.join(args)} failed:\n{done.stderr[-3000:]}")


def continued(folder: Path, length: int, *args: str) -> Path:
    """The directory of the model that ``tiny_{length}.yaml`` makes in ``folder``."""
    model = folder / "runs" / "context" / str(length) / "model"
    if not model.exists():
        command(folder, "fit", "--config", str(EXAMPLES / f"tiny_{length}.yaml"), *args)
        saved = str(model.parent / "last.ckpt")
        command(folder, "export", saved, str(model), "--dtype", "float32")
    return model


def yarn() -> dict[str, Any]:
    settings = yaml.safe_load((EXAMPLES / "tiny_512.yaml").read_text())
    overrides: dict[str, Any] = settings["model"]["init_args"]["overrides"]
    return overrides


@torch.no_grad()
def losses(model: Path, overrides: Mapping[str, Any], sequences: int) -> list[float]:
    """Nats per byte at positions 0 to 127, 128 to 511, 512 to 2047."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was made with other settings")
        module = DeepSeekV3.from_pretrained(model, overrides=overrides).eval()  # type: ignore[arg-type]
    data = TextDataModule(sequence_length=LENGTHS[-1], batch_size=2)
    data.prepare_data()
    data.setup("validate")
    found, seen = torch.zeros(LENGTHS[-1], dtype=torch.float64), 0
    for batch in data.val_dataloader():
        logits_BTV = module(batch["input_ids"])
        found += F.cross_entropy(logits_BTV.transpose(1, 2), batch["labels"], reduction="none").double().sum(0)
        seen += len(batch["labels"])
        if seen >= sequences:
            break
    return [float(part.mean()) / seen for part in found.split([128, 384, 1536])]


def table(rows: Sequence[tuple[str, list[float]]]) -> str:
    lines = ["| | 0 to 127 | 128 to 511 | 512 to 2047 |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |" for name, row in rows])


def measure(folder: Path, sequences: int) -> list[tuple[str, list[float]]]:
    stretched, plain = folder / "yarn", folder / "plain"
    for each in (stretched, plain):
        each.mkdir(parents=True, exist_ok=True)
    base = continued(stretched, 128)
    rows = [
        ("trained on 128", losses(base, WITHOUT, sequences)),
        ("the same with YaRN, not trained with it", losses(base, yarn(), sequences)),
    ]
    before = {stretched: base, plain: base}
    for length in LENGTHS[1:]:
        for where, name, overrides in ((stretched, "YaRN", yarn()), (plain, "without", WITHOUT)):
            other = ["--model.init_args.overrides", json.dumps(overrides)] if where is plain else []
            model = continued(where, length, "--model.init_args.pretrained", str(before[where]), *other)
            rows.append((f"continued on {length}, {name}", losses(model, overrides, sequences)))
            before[where] = model
            print(table(rows[-1:]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where models stay, and are found again (default: they do not)")
    parser.add_argument("--sequences", type=int, default=32, help="of 2048 bytes to measure on (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure((options.folder or Path(temporary)).absolute(), options.sequences)
    print(f"\n{table(rows)}\n\nnats per byte by position, torch {torch.__version__}, {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
