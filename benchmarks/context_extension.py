"""Extending the context in small: the model and the phases of examples/context_extension, and the same without YaRN.

    OMP_NUM_THREADS=1 python benchmarks/context_extension.py          # threads that wait for each other only cost time
    python benchmarks/context_extension.py --json context.json

A model is trained on sequences of 128 bytes, saved, continued on 512, saved, continued on 2048: what tiny_*.yaml say,
in one process instead of two. Then each model reads held-out sequences of 2048 bytes; the loss of a byte is averaged
by its position: beyond the length a model was trained on it shows what its rotary embedding is worth there. A sequence
may hold several documents, so that the position is not that in a document; it is the same for all models.
"""

import argparse
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import yaml

from lightning_dualpipe import DeepSeekV3, TextDataModule

EXAMPLES = Path(__file__).parent.parent / "examples" / "context_extension"
PHASES = (512, 2048)
WITHOUT = {"max_position_embeddings": 2560, "rope_scaling": None}


def settings(length: int) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / f"tiny_{length}.yaml").read_text())
    return found


def train(length: int, target: Path, **arguments: Any) -> None:
    """As ``tiny_{length}.yaml`` says, but for these arguments of the model, into a Hugging Face directory."""
    found = settings(length)
    L.seed_everything(found["seed_everything"], verbose=False)
    module = DeepSeekV3(**{**found["model"]["init_args"], **arguments})
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=found["trainer"]["max_steps"],
        gradient_clip_val=found["trainer"]["gradient_clip_val"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, TextDataModule(**found["data"]["init_args"]))
    module.save_pretrained(target, dtype="float32")
    print(f"{target.name}: training loss {float(trainer.callback_metrics['train_loss']):.3f}", flush=True)


@torch.no_grad()
def losses(model: Path, overrides: Mapping[str, Any], sequences: int) -> list[float]:
    """Nats per byte at positions 0 to 127, 128 to 511, 512 to 2047."""
    module = DeepSeekV3.from_pretrained(model, overrides=overrides).eval()  # type: ignore[arg-type]
    data = TextDataModule(sequence_length=PHASES[-1], batch_size=2)
    data.prepare_data()
    data.setup("validate")
    found, seen = torch.zeros(PHASES[-1], dtype=torch.float64), 0
    for batch in data.val_dataloader():
        logits_BTV = module(batch["input_ids"])
        found += F.cross_entropy(logits_BTV.transpose(1, 2), batch["labels"], reduction="none").double().sum(0)
        seen += len(batch["labels"])
        if seen >= sequences:
            break
    return [float(part.mean()) / seen for part in found.split([128, 384, 1536])]


def measure(folder: Path, sequences: int) -> list[tuple[str, list[float]]]:
    yarn = settings(PHASES[0])["model"]["init_args"]["overrides"]
    base = folder / "128"
    train(128, base)
    rows = [
        ("trained on 128", losses(base, WITHOUT, sequences)),
        ("the same with YaRN, before it is trained with it", losses(base, yarn, sequences)),
    ]
    print(table(rows), flush=True)
    before = {"with YaRN": base, "without": base}
    for length in PHASES:
        for name, overrides in (("with YaRN", yarn), ("without", WITHOUT)):
            target = folder / f"{length} {name}"
            train(length, target, pretrained=before[name], overrides=overrides)
            before[name] = target
            rows.append((f"then on {length}, {name}", losses(target, overrides, sequences)))
            print(table(rows[-1:]), flush=True)
    return rows


def table(rows: Sequence[tuple[str, list[float]]]) -> str:
    lines = ["| | 0 to 127 | 128 to 511 | 512 to 2047 |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |" for name, row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32, help="of 2048 bytes to measure on (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*was made with other settings")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.sequences)
    print(f"\n{table(rows)}\n\nnats per byte by position, torch {torch.__version__}, {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
