"""One training run as the layout tests need it: the same module and data under any strategy, and what it computed.

``train(rank, run)`` is called by ``run_ranks`` on every rank of a world, or in this process with rank 0.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch import Tensor, nn

from lightning_dualpipe import DeepSeekV3, DualPipeStrategy, FP8Precision, TextDataModule
from lightning_dualpipe.deepseek_v3.recompute import Recompute
from lightning_dualpipe.interface import ReplicaAware
from lightning_dualpipe.pipeline.overlap import ORDERS
from tests.ranks import run_ranks

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "initializer_range": 0.1,
    "aux_loss_alpha": 1e-2,
    "bias_update_speed": 1e-2,
    "num_nextn_predict_layers": 1,
}


ROUTING = {  # biases of all routers at the start
    "uneven": (0.1, -0.1, -0.03, 0.03),
    "starved": (9.0, 9.0, 0.0, 0.0),  # the second half of the experts gets nothing
}


@dataclass(frozen=True)
class Run:
    """``strategy=None`` is ``Trainer(strategy="auto")`` in one process; a string, another of Lightning's own."""

    strategy: Mapping[str, Any] | str | None = None
    world: int = 1
    nodes: int = 1  # as Lightning sees them
    steps: int = 30
    precision: str = "64-true"
    accumulate: int = 1
    clip: float | None = 1.0
    model: str = "deepseek_v3"
    corpus: str = ""
    padded: bool = False
    global_batch: int = 8
    recompute: Recompute = "none"
    order: str | None = None  # in which pairs of microbatches are launched; None: what this device takes
    routing: str = "even"  # that of fresh biases; or one of ROUTING
    trainer: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-2
    fp8: Mapping[str, Any] | None = None  # FP8Precision's arguments; ``precision`` is that of its weights then

    @property
    def batch_size(self) -> int:
        """Sequences per data rank, so that all runs read the same global batches."""
        pipeline = self.strategy["pipeline_parallel_size"] if isinstance(self.strategy, Mapping) else 1
        return self.global_batch // (self.world // pipeline)


@dataclass(frozen=True)
class Result:
    losses: list[float]
    norms: list[float]  # before clipping
    evaluated: list[float]  # losses of validations
    biases: dict[str, list[float]]  # by router, of the layers on this rank
    counts: dict[str, list[int]]  # tokens per expert of the last step


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.evaluated: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.evaluated.append(float(trainer.callback_metrics["val_loss"]))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, ReplicaAware):
            self.norms.append(float(strategy.gradient_norm()))
        else:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(float(nn.utils.get_total_norm(gradients)))


class Skew(L.Callback):
    def __init__(self, biases: Sequence[float]) -> None:
        self.biases = torch.tensor(biases)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for _, router in pl_module.model.routers():  # type: ignore[union-attr, operator]
            router.e_score_correction_bias.copy_(self.biases)


def train_everywhere(run: Run) -> list[Result]:
    """The results of all ranks; of one for ``auto``."""
    return run_ranks(run.world, train, run, timeout=240)


def train(rank: int, run: Run) -> Result:
    trainer, module, data = build(rank, run)
    recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
    where = "lightning_dualpipe.strategy.strategy.launch_order"
    with patch(where, lambda _: ORDERS[run.order]) if run.order else nullcontext():
        trainer.fit(module, data)
    biases, counts = {}, {}
    if isinstance(module, DeepSeekV3):
        biases = {name: router.e_score_correction_bias.tolist() for name, router in module.model.routers()}
        counts = {name: load.tolist() for name, load in module.expert_load.items()}
    return Result(recorder.losses, recorder.norms, recorder.evaluated, biases, counts)


def build(
    rank: int, run: Run, *, callbacks: Sequence[L.Callback] = ()
) -> tuple[L.Trainer, L.LightningModule, TextDataModule]:
    pretend_torchrun(rank, run.world, run.nodes)
    L.seed_everything(7, verbose=False)
    plugins = {} if run.fp8 is None else {"plugins": [FP8Precision(**{"weights": run.precision, **run.fp8})]}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=run.world // run.nodes,
        num_nodes=run.nodes,
        strategy=DualPipeStrategy(**run.strategy) if isinstance(run.strategy, Mapping) else run.strategy or "auto",
        precision=run.precision if run.fp8 is None else None,  # type: ignore[arg-type]
        max_steps=run.steps,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=run.clip,
        callbacks=[Recorder(), *([Skew(ROUTING[run.routing])] if run.routing != "even" else []), *callbacks],
        **{**QUIET, **plugins, **run.trainer},
    )
    return trainer, build_module(run), build_data(run)


QUIET: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


def build_module(run: Run) -> L.LightningModule:
    if run.model == "deepseek_v3":
        overrides = {**SHAPE, **run.overrides}
        settings: Any = {"learning_rate": run.learning_rate, "warmup_steps": 5, "recompute": run.recompute}
        return DeepSeekV3("tiny", overrides, **settings)  # type: ignore[arg-type]
    from examples.your_own_model import LanguageModel

    return LanguageModel(width=32, depth=6, heads=2)


def build_data(run: Run) -> TextDataModule:
    return (Padded if run.padded else TextDataModule)(
        run.corpus, sequence_length=16, batch_size=run.batch_size, cache_dir=Path(run.corpus).parent / "cache"
    )


class Padded(TextDataModule):
    """Ends each sequence somewhere, the same place for the same sequence."""

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        lengths_B1 = 4 + batch["input_ids"].sum(-1, keepdim=True) % (self.sequence_length - 3)
        mask_BT = torch.arange(self.sequence_length) < lengths_B1
        return {**batch, "labels": batch["labels"].where(mask_BT, -100), "attention_mask": mask_BT.long()}


def write_corpus(folder: Path) -> str:
    """Text with some structure to learn, enough for the runs."""
    words = "the cat sat on the mat and saw a dog run over the hill to find some bread".split()
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (6000,), generator=generator).tolist()
    path = folder / "corpus.txt"
    path.write_text(" ".join(words[pick] for pick in picks))
    return str(path)


def pretend_torchrun(rank: int, world: int, nodes: int = 1) -> None:
    """The process group is there already; Lightning reads its place from torchrun's variables."""
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % (world // nodes)),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world // nodes),
            "GROUP_RANK": str(rank // (world // nodes)),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
            "TORCHELASTIC_RUN_ID": "tests",
        }


def gathered(results: list[Result], attribute: str) -> dict[str, Any]:
    """Biases or counts of all layers, from the ranks that hold them; replicas must agree."""
    merged: dict[str, Any] = {}
    for result in results:
        for name, value in getattr(result, attribute).items():
            assert merged.setdefault(name, value) == value, f"ranks disagree about {attribute} of {name}"
    return merged


def same_everywhere(results: list[Result]) -> Tensor:
    """Losses [steps]; every rank must report the same."""
    losses = torch.tensor([result.losses for result in results], dtype=torch.float64)
    assert (losses == losses[0]).all(), "ranks report different losses"
    return losses[0]
