"""The model that is served: what the quickstart leaves, exported as a user would."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lightning_dualpipe import DeepSeekV3, TextDataModule

ROOT = Path(__file__).parent.parent.parent
STEPS = 300


@dataclass(frozen=True)
class Trained:
    """An exported model, in float32, and text that it was not trained on."""

    directory: Path
    module: DeepSeekV3
    held_out: list[list[int]]

    @torch.no_grad()
    def log_probs(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of each token but the first [T - 1]."""
        logits = self.module(torch.tensor([tokens]))[0, :-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        return self.module.generate(list(prompt), max_new_tokens=count, stop=[]).tokens[0]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """From ``LIGHTNING_DUALPIPE_CHECKPOINT``, one of the quickstart; without it, minutes of training."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = os.environ.get("LIGHTNING_DUALPIPE_CHECKPOINT") or _train(folder)
    directory = folder / "exported"
    _run(
        folder, "export", str(Path(checkpoint).absolute()), str(directory), "--dtype", "float32", "--tokenizer", "bytes"
    )
    return Trained(directory, DeepSeekV3.from_pretrained(directory).eval(), _held_out_text(folder))


def _train(folder: Path) -> Path:
    config = ["--config", str(ROOT / "examples" / "quickstart.yaml"), "--trainer.max_steps", str(STEPS)]
    _run(folder, "fit", *config, "--trainer.logger.init_args.save_dir", str(folder / "runs"))
    (checkpoint,) = folder.glob("runs/quickstart/version_0/checkpoints/last.ckpt")
    return checkpoint


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_dualpipe.cli", *command], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]


def _held_out_text(folder: Path) -> list[list[int]]:
    """Of the split that the quickstart made."""
    data = TextDataModule(sequence_length=256, batch_size=64, cache_dir=folder / "cache")
    data.prepare_data()
    data.setup("validate")
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    return [list(map(int, text)) for text in next(iter(loader))["input_ids"]]
