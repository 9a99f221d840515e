"""A model with everything a cut has to deal with, and an engine for it without Lightning.

    ids, x ─► rung ─► rung ─► … ─► penalty ─► head ─► loss          values: h_BD, ids_B, total_B

Three tensors cross every cut: activations, integers that no gradient belongs to, and a sum per sample
that rides along. The penalty is for the loss only; the head is not a plain module.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dualpipe.interface import (
    Batch,
    Layer,
    Phase,
    PipelineModel,
    TensorSpec,
    WeightGradients,
    as_layers,
    run_uncut,
)
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.overlap import ORDERS, LaunchOrder
from lightning_dualpipe.pipeline.partition import partition
from lightning_dualpipe.pipeline.stage import Stage
from lightning_dualpipe.pipeline.streams import CommunicationStream
from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.precision.linear import make_linears_deferrable
from lightning_dualpipe.schedules import build_schedule

WIDTH, CLASSES, KINDS = 6, 5, 7
CPU = torch.device("cpu")


class Rung(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.kind = nn.Embedding(KINDS, WIDTH)

    def forward(self, h_BD: Tensor, ids_B: Tensor, total_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h_BD = h_BD + self.down(torch.tanh(self.up(self.norm(h_BD)) * 0.5)) * self.kind(ids_B)
        return h_BD, ids_B, total_B + h_BD.square().mean(-1)


class Ladder(nn.Module):
    def __init__(self, depth: int = 9, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.rungs = nn.ModuleList(Rung() for _ in range(depth))
            self.auxiliary = nn.Linear(WIDTH, 1)
            self.head = nn.Linear(WIDTH, CLASSES)
        self.to(dtype)

    def layers(self) -> Sequence[Layer | nn.Module]:
        head = Layer("head", (Phase("project", self._project),), (self.head,), cost=100, with_previous=True)
        penalty = Layer(
            "penalty",
            (Phase("penalize", self._penalize, takes_batch=True),),
            (self.auxiliary,),
            cost=10,
            for_loss=True,
        )
        return [*self.rungs, penalty, head]

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch["x"], batch["ids"], batch["x"].new_zeros(len(batch["x"]))

    def boundary(self, batch: Batch) -> Sequence[TensorSpec]:
        samples = len(batch["x"])
        return [TensorSpec((samples, WIDTH)), TensorSpec((samples,), torch.int64), TensorSpec((samples,))]

    def loss(self, values: tuple[Tensor, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        logits_BC, total_B = values
        labels_B = batch["labels"]
        total = F.cross_entropy(logits_BC, labels_B, ignore_index=-100, reduction="sum") + 0.1 * total_B.sum()
        hits = (logits_BC.argmax(-1) == labels_B).sum()
        return {"loss": total, "tokens": (labels_B != -100).sum(), "hits": hits, "penalty": total_B.sum()}

    def forward(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        return run_uncut(self, batch)

    def _penalize(self, h_BD: Tensor, ids_B: Tensor, total_B: Tensor, *, batch: Batch) -> tuple[Tensor, ...]:
        wanted = (batch["labels"] != -100).to(h_BD.dtype)
        return h_BD, ids_B, total_B + wanted * self.auxiliary(h_BD).squeeze(-1).square()

    def _project(self, h_BD: Tensor, ids_B: Tensor, total_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(h_BD), total_B


def build_batch(samples: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    labels[::4] = -100
    return {
        "x": torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
        "ids": torch.randint(KINDS, (samples,), generator=generator),
        "labels": labels,
    }


def without_labels(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def build_engine(
    model: PipelineModel,
    schedule: str,
    num_ranks: int,
    *,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype = torch.float64,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    order: LaunchOrder | None = ORDERS["eager"],
    device: torch.device = CPU,
    stream: CommunicationStream | None = None,
) -> Engine:
    """What ``rank`` of a pipeline runs. ``"dualpipev"`` has two stages even on one rank, and needs no group there.

    ``order=None``: layers wait for their own communication.
    """
    stream = stream or CommunicationStream(device)
    placement = build_schedule(schedule, num_ranks, 1)
    layers = as_layers(model.layers())
    parts = partition(layers, placement.placement)
    stages = {}
    for index in placement.stages_on(rank):
        mine = [layers[position] for position in parts[index]]
        stages[index] = Stage(
            index, placement.num_stages, model, mine, WeightGradients(), context, order is not None, stream
        )
        for module in (module for layer in mine for module in layer.modules):
            make_linears_deferrable(module, stages[index].weight_gradients)
    return Engine(
        model,
        partial(build_schedule, schedule, num_ranks),
        rank=rank,
        stages=stages,
        transport=Transport(group, device, stream),
        dtype=dtype,
        order=order or ORDERS["eager"],
    )


def parameters_of(engine: Engine) -> dict[str, nn.Parameter]:
    """The parameters of the stages of a rank, by the names of the whole model."""
    here = {id(p) for s in engine.stages.values() for layer in s.layers for m in layer.modules for p in m.parameters()}
    assert isinstance(engine.model, nn.Module)
    return {name: parameter for name, parameter in engine.model.named_parameters() if id(parameter) in here}


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in parameters_of(engine).items() if parameter.grad is not None}


def uncut_gradients(model: Ladder, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The means the uncut model reports, and the gradient of its mean loss by name."""
    out = model(batch)
    assert isinstance(out, dict)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out["loss"], parameters)
    return {name: value.detach() for name, value in out.items()}, dict(zip(names, gradients, strict=True))
