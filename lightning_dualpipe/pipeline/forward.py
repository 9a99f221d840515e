"""What the ``forward`` of a model becomes on a rank of a pipeline.

    loss = self.model(batch)["loss"]     runs the whole schedule, backward included, on every rank
    loss.backward()                      hands over the gradients that were computed on the way

The number returned is the same on every rank: the mean over all tokens of the global batch. The
gradients wait until ``backward`` and arrive multiplied by whatever was done to the loss in between
(divided for accumulation, weighted, added to another loss), because gradients are linear in it. They
may have been summed over ranks by then, so it must be the same on every rank, as the loss is.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Batch, means, only_the_loss_carries_gradients
from lightning_dualpipe.parallel.early_sums import GradientSums, Step
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.microbatches import check_batch, choose_num_microbatches, num_samples, split

__all__ = ["PipelinedForward"]


@dataclass(slots=True)
class PipelinedForward:
    """Callable in place of ``model.forward(batch)``; see ``interface.run_uncut`` for what it returns.

    Args:
        named: the parameters of this rank by name; their ``.grad`` is delivered by ``backward``.
        sums: sums them over the other ranks that hold them.
        pipeline: ranks that share a batch. None: this rank alone.
        data: ranks with the same stages and other batches, for host-side agreement. None: alone.
        world: all ranks. None: this rank alone.
    """

    engine: Engine
    named: Callable[[], Mapping[str, nn.Parameter]]
    sums: GradientSums
    num_ranks: int
    num_microbatches: int | Literal["auto"]
    device: torch.device
    pipeline: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    world: dist.ProcessGroup | None = None
    num_microbatches_used: int | None = None
    """Pieces of the last training batch."""
    _largest: int = 0
    _names: dict[bool, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        batch = check_batch(batch)
        if "labels" not in batch:
            with torch.no_grad():
                return self._predict(batch)
        if not torch.is_grad_enabled():
            pieces = split(batch, self._count(batch, training=False))
            return self._report(self._reduce(self.engine.evaluate(pieces), training=False))
        return self._train(batch)

    def _train(self, batch: Batch) -> dict[str, Tensor]:
        pieces = split(batch, self._count(batch, training=True))
        self.num_microbatches_used = len(pieces)
        named, step = self.named(), self.sums.begin()
        before = {name: parameter.grad for name, parameter in named.items()}
        for parameter in named.values():
            parameter.grad = None
        try:
            with _without_hooks(named.values()):
                sums = self.engine.train(pieces, on_stage_done=step.stage_done)
                for stage in self.engine.stages:  # one that no microbatch came by is done as well
                    step.stage_done(stage)
                sums = self._reduce(sums, training=True)
            step.gradients = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
        finally:
            for name, parameter in named.items():
                parameter.grad = before[name]
        report = self._report(sums)
        # a leaf of its own, so that the loss is differentiable even on a rank without parameters
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        scale = sums["tokens"].clamp(min=1).reciprocal()
        report["loss"] = _Deliver.apply(report["loss"], scale, step, list(named), anchor, *named.values())
        return only_the_loss_carries_gradients(report)

    def _count(self, batch: Batch, *, training: bool) -> int:
        """The number of microbatches, equal on all ranks that exchange tokens or activations."""
        samples = num_samples(batch)
        count = choose_num_microbatches(samples, self.num_microbatches, num_ranks=self.num_ranks)
        # a smaller one is the last of an epoch, and so may be the first one seen, where a run is resumed
        if training and samples % count and samples >= self._largest > 0:
            raise ConfigurationError(
                f"a batch of {samples} samples does not split into num_microbatches={count} equal parts; "
                f"use a batch size that is a multiple of {count}, or num_microbatches='auto'"
            )
        if training:  # the last batch of an epoch may be smaller and split unevenly: sums stay exact
            self._largest = max(self._largest, samples)
        count = max(min(count, samples), 1)
        if self.data is not None:
            agreed = torch.tensor(count)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.data)
            count = int(agreed)
        return count

    def _reduce(self, sums: Mapping[str, Tensor], *, training: bool) -> dict[str, Tensor]:
        """Sums over all microbatches of all pipelines, known to every rank; float64, so that counts are exact."""
        names = self._agree_on_names(sums, training=training)
        if new := sorted(sums.keys() - set(names)):
            raise ConfigurationError(
                f"{type(self.engine.model).__name__}.loss reports {', '.join(map(repr, new))}, which it did not in the "
                f"first batch ({', '.join(names)}); report the same sums for every batch, zero where there is nothing"
            )
        total = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        for index, name in enumerate(names):
            if name in sums:
                total[index] = sums[name]
        if self.world is not None:
            dist.all_reduce(total, group=self.world)
        return dict(zip(names, total, strict=True))

    def _report(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = torch.float64 if self.engine.dtype == torch.float64 else torch.float32
        return {name: value if name == "tokens" else value.to(dtype) for name, value in means(sums).items()}

    def _agree_on_names(self, sums: Mapping[str, Tensor], *, training: bool) -> tuple[str, ...]:
        """Only the last stage knows what the model reports; asked once."""
        if training not in self._names:
            found: list[Any] = [sorted(sums)]
            if self.world is not None:
                found = [None] * dist.get_world_size(self.world)
                dist.all_gather_object(found, sorted(sums), group=self.world)
            self._names[training] = tuple(sorted({name for names in found for name in names}))
        return self._names[training]

    def _predict(self, batch: Batch) -> Tensor:
        count = self._count(batch, training=False)
        outputs = self.engine.predict(split(batch, count))
        owners = [self.engine.owner_of_output(microbatch, count) for microbatch in range(count)]
        return torch.cat([self._share(outputs.get(index), owner) for index, owner in enumerate(owners)])

    def _share(self, output: Tensor | None, owner: int) -> Tensor:
        """``output`` of the pipeline rank ``owner``, on every rank of the pipeline."""
        if self.pipeline is None:
            assert output is not None, "one rank has all outputs"
            return output
        box: list[Any] = [None if output is None else (output.shape, output.dtype)]
        dist.broadcast_object_list(box, group=self.pipeline, group_src=owner)
        if output is None:
            shape, dtype = box[0]
            output = torch.empty(shape, dtype=dtype, device=self.device)
        output = output.contiguous()
        if output.numel():
            dist.broadcast(output, group=self.pipeline, group_src=owner)
        return output


@contextmanager
def _without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A hook sees a parameter's gradient once, when ``backward`` delivers it, and not what microbatches add to it."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooks = [(parameter, name, getattr(parameter, name)) for parameter in parameters for name in names]
    hooks = [each for each in hooks if each[-1]]
    for parameter, name, _ in hooks:
        setattr(parameter, name, OrderedDict())  # None would not take the latter away
    try:
        yield
    finally:
        for parameter, name, before in hooks:
            setattr(parameter, name, before)


class _Deliver(torch.autograd.Function):
    """A loss whose gradients have been computed already: ``backward`` hands them over, scaled."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, scale: Tensor, step: Step, names: list[str], anchor: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.step, ctx.scale, ctx.names = step, scale, names
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.step.take()
        if gradients is None:
            raise RuntimeError(
                "backward was called twice on the loss of one pipeline step: its gradients were handed over the first "
                "time. Add up the losses first, or call the model again."
            )
        factor = grad * ctx.scale
        for gradient in gradients.values():
            gradient.mul_(factor)
        return None, None, None, None, None, *(gradients.pop(name, None) for name in ctx.names)
