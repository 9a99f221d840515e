"""A model of your own under ``strategy="dualpipe"``: a small GPT of plain ``nn.Linear`` blocks.

    python examples/your_own_model.py                                      # four processes, DualPipe
    python examples/your_own_model.py --strategy auto --devices 1          # the same losses in one

What a pipeline needs to know are the four methods of ``GPT`` below ``__init__``: the layers in order,
what the first one receives, what passes from one to the next, and the loss as a sum over tokens.
Everything else is an ordinary LightningModule.
"""

import argparse
from collections.abc import Mapping, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dualpipe import Batch, TensorSpec, TextDataModule, run_uncut


class GPT(nn.Module):
    def __init__(self, vocab_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.embedding = Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocab_size))

    def layers(self) -> Sequence[nn.Module]:
        """In order; each is called with what the one before returned."""
        return [self.embedding, *self.blocks, self.head]

    def inputs(self, batch: Batch) -> Tensor:
        """What the first layer is called with."""
        return batch["input_ids"]

    def boundary(self, batch: Batch) -> Sequence[TensorSpec]:
        """What passes from any layer to the next."""
        return [TensorSpec((*batch["input_ids"].shape, self.width))]

    def loss(self, values: tuple[Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Sums over tokens, from what the last layer returned."""
        (logits,) = values
        labels = batch["labels"]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        hits = (logits.argmax(-1) == labels).sum()
        return {"loss": total, "tokens": (labels != -100).sum(), "accuracy": hits}

    def forward(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        return run_uncut(self, batch)


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, width: int, max_length: int = 1024) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_length, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.tokens(input_ids) + self.positions(positions)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class LanguageModel(L.LightningModule):
    def __init__(self, vocab_size: int = 264, width: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.model = GPT(vocab_size, width, depth, heads)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.model(batch)
        self.log("train_loss", out["loss"], prog_bar=True)
        self.log("train_accuracy", out["accuracy"], prog_bar=True)
        return out["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.model(batch)["loss"], sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="dualpipe")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--path", default=None, help="text to train on; default: the Python standard library")
    arguments = parser.parse_args()

    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=arguments.strategy,
        devices=arguments.devices,
        max_steps=arguments.steps,
        limit_val_batches=8,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(LanguageModel(), TextDataModule(arguments.path, sequence_length=128, batch_size=16))


if __name__ == "__main__":
    main()
