"""What can be known to be wrong with a run before a process is started."""

from collections.abc import Sequence
from typing import Literal

import torch

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.schedules import SCHEDULES

__all__ = ["check_arguments", "check_run"]


def check_arguments(
    pipeline: int | Literal["auto"], expert: int, schedule: str, num_microbatches: int | Literal["auto"]
) -> None:
    problems = [
        f"{name}={value!r} must be a positive whole number{or_auto}"
        for name, value, or_auto in (
            ("pipeline_parallel_size", pipeline, " or 'auto'"),
            ("expert_parallel_size", expert, ""),
            ("num_microbatches", num_microbatches, " or 'auto'"),
        )
        if not (or_auto and value == "auto") and not (isinstance(value, int) and value > 0)
    ]
    if schedule not in SCHEDULES:
        problems.append(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if problems:
        raise ConfigurationError.of("DualPipeStrategy cannot be built", problems)


def check_run(
    schedule: str,
    layout: ParallelLayout,
    *,
    devices: Sequence[torch.device],
    precision: str,
    syncs_batchnorm: bool,
) -> None:
    """One error that lists every problem of this Trainer with this strategy."""
    problems = layout.problems()
    if schedule == "dualpipe" and layout.pipeline > 1 and layout.pipeline % 2:
        problems.append(
            f"dualpipe needs an even number of pipeline ranks, got {layout.pipeline}; "
            f"use schedule='dualpipev', which takes any, or pipeline_parallel_size={layout.pipeline - 1}"
        )
    if any(device.type == "mps" for device in devices):
        problems.append("MPS devices cannot talk to one another; use accelerator='cpu' or CUDA devices")
    if syncs_batchnorm:
        problems.append(
            "sync_batchnorm=True has no meaning here: microbatches of one batch never meet in a layer; remove it"
        )
    if precision.startswith("16"):
        problems.append(
            f"precision={precision!r} would let ranks skip different steps, and sums of losses overflow float16; "
            "use precision='bf16-mixed' or 'bf16-true'"
        )
    if problems:
        raise ConfigurationError.of(f"strategy {schedule!r} cannot run", problems)
