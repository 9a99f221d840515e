"""The model summary of a model that no rank holds whole.

    DeepSeekV3: 2,411,008 parameters, 1,525,248 used by a token
    4 ranks: pipeline 2 x data 2, experts spread over 2 data ranks, schedule dualpipe
    stage  layers                            parameters  on pipeline ranks
        0  embed_tokens ... blocks.1          1,063,168  0 1
        1  blocks.2 ... lm_head               1,347,840  0 1
    a rank holds up to 1,920,000 parameters, 7.7 MB

Lightning's own summary counts the modules it finds in this process. It would print one rank's part
as if it were the model, so it is replaced where it is the default one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, runtime_checkable

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_dualpipe.strategy.strategy import DualPipeStrategy

__all__ = ["KnowsActiveParameters", "WholeModelSummary", "summarize_the_whole_model"]


@runtime_checkable
class KnowsActiveParameters(Protocol):
    """A LightningModule of which a token uses only a part."""

    def num_active_parameters(self) -> int: ...


def summarize_the_whole_model(trainer: Trainer) -> None:
    """Put ``WholeModelSummary`` in the place of Lightning's summaries; those of users stay."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for index, callback in enumerate(callbacks):
        if isinstance(callback, ModelSummary) and type(callback) in (ModelSummary, RichModelSummary):
            callbacks[index] = WholeModelSummary(max_depth=callback._max_depth)


class WholeModelSummary(ModelSummary):
    """Total, per stage and per rank; ``max_depth=0`` turns it off."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._max_depth:
            return
        strategy = cast("DualPipeStrategy", trainer.strategy)
        parts = [_count_here(strategy)]
        if strategy.groups.world_host is not None:
            parts *= strategy.world_size
            dist.all_gather_object(parts, parts[0], group=strategy.groups.world_host)
        if trainer.is_global_zero:
            rank_zero_info("\n".join(["", *_lines(strategy, pl_module, parts), ""]))


class _Part(NamedTuple):
    """What one rank holds. Of the ranks that hold the same numbers the first owns them, so that sums count once."""

    held: int
    bytes_held: int
    owned: int
    trainable: int  # of the owned ones
    owned_by_stage: list[int]
    stages: list[int]  # of which all tensors are here


def _count_here(strategy: "DualPipeStrategy") -> _Part:
    assembly = strategy.assembly
    assert assembly is not None, "the model has been cut"
    named = assembly.named_parameters()
    owned = {name: parameter for name, parameter in named.items() if name in assembly.store.owned}
    whole, num_stages = assembly.part.whole, len(assembly.part.stages)
    owned_by_stage = [0] * num_stages
    for name, parameter in owned.items():
        for stage in whole.stages_of[name]:
            owned_by_stage[stage] += parameter.numel()
    here = {whole.same_as[name] for name in assembly.owner.state_dict() if name in whole.same_as}
    elsewhere = {stage for name, stages in whole.stages_of.items() if name not in here for stage in stages}
    return _Part(
        held=sum(parameter.numel() for parameter in named.values()),
        bytes_held=sum(parameter.numel() * parameter.element_size() for parameter in named.values()),
        owned=sum(parameter.numel() for parameter in owned.values()),
        trainable=sum(parameter.numel() for parameter in owned.values() if parameter.requires_grad),
        owned_by_stage=owned_by_stage,
        stages=[stage for stage in range(num_stages) if stage not in elsewhere],
    )


def _lines(strategy: "DualPipeStrategy", module: LightningModule, parts: Sequence[_Part]) -> list[str]:
    layout = strategy.layout
    total, trainable = sum(part.owned for part in parts), sum(part.trainable for part in parts)
    first = f"{type(module).__name__}: {total:,} parameters"
    if trainable < total:
        first += f", {trainable:,} of them trainable"
    if isinstance(module, KnowsActiveParameters):
        first += f", {module.num_active_parameters():,} used by a token"
    second = f"{layout.world} ranks: pipeline {layout.pipeline} x data {layout.data}"
    if layout.expert > 1:
        second += f", experts spread over {layout.expert} data ranks"
    second += f", schedule {strategy.schedule}"
    held, memory = max(part.held for part in parts), max(part.bytes_held for part in parts) / 1e6
    last = f"a rank holds up to {held:,} parameters, {memory:,.1f} MB"
    return [first, second, *_table(strategy, parts), last]


def _table(strategy: "DualPipeStrategy", parts: Sequence[_Part]) -> list[str]:
    """A line for every stage. One that several stages share is counted in each."""
    assert strategy.assembly is not None
    layers, stages = strategy.assembly.part.layers, strategy.assembly.part.stages
    spans = [_span([layers[index].name for index in stage]) for stage in stages]
    width = max(map(len, ["layers", *spans]))
    lines = [f"stage  {'layers'.ljust(width)}  {'parameters':>17}  on pipeline ranks"]
    for stage, span in enumerate(spans):
        size = sum(part.owned_by_stage[stage] for part in parts)
        holders = {strategy.layout.pipeline_rank(r) for r, part in enumerate(parts) if stage in part.stages}
        lines.append(f"{stage:>5}  {span.ljust(width)}  {size:>17,}  {' '.join(map(str, sorted(holders)))}")
    return lines


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
