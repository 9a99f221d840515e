"""One step of all ranks, recorded and brought together on rank 0."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from lightning_dualpipe.parallel.groups import Groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.record import NOBODY, Recorder
from lightning_dualpipe.schedules.record import RankRecord, Slice, StepRecord

__all__ = ["start_recording", "stop_recording"]


def start_recording(engine: Engine, device: torch.device, align: Callable[[], None]) -> Recorder:
    """Of the next training step of ``engine``. All ranks do this before the same step."""
    layers = (layer for stage in engine.stages.values() for layer in stage.layers)
    recorder = Recorder(device, layers, align)
    engine.observer = recorder
    return recorder


def stop_recording(engine: Engine, recorder: Recorder, layout: ParallelLayout, groups: Groups) -> StepRecord | None:
    """What all ranks have recorded, on rank 0; None on the others, and if there was no step. A collective."""
    engine.observer = NOBODY
    if recorder.schedule is None:
        return None
    mine = recorder.slices()
    found: list[tuple[Slice, ...]] = [mine]
    if groups.world_host is not None:
        first = groups.rank == 0
        found = [()] * layout.world
        dist.gather_object(mine, found if first else None, dst=0, group=groups.world_host)
        if not first:
            return None
    ranks = (RankRecord(layout.pipeline_rank(rank), slices) for rank, slices in enumerate(found))
    return StepRecord(recorder.schedule, tuple(ranks))
