"""What can be known to be wrong with a run before a process is started.

check_arguments   when the strategy is made
check_run         when the Trainer is made
check_model       when the Trainer is given a model, as far as that is built
check_callbacks   likewise
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import as_layers
from lightning_dualpipe.parallel.choice import DISPATCHERS, why_not
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.pipeline.partition import Whole, partition
from lightning_dualpipe.precision.recipe import Delayed, Recipe
from lightning_dualpipe.schedules import SCHEDULES, build_schedule
from lightning_dualpipe.strategy.assembly import check_experts, find_pipeline_model, program_name

__all__ = ["check_arguments", "check_callbacks", "check_model", "check_run", "dtype_of"]


def check_arguments(
    pipeline: int | Literal["auto"],
    expert: int,
    schedule: str,
    num_microbatches: int | Literal["auto"],
    precision: str,
    dispatcher: str,
    save_distributed_checkpoint: object,
    hang_timeout: float | None,
    timeout: timedelta,
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
    if precision not in ("32", "parameters"):
        problems.append(f"optimizer_precision={precision!r} is neither '32' nor 'parameters'")
    if dispatcher not in DISPATCHERS:
        problems.append(f"dispatcher={dispatcher!r} is not one of {', '.join(DISPATCHERS)}")
    if save_distributed_checkpoint not in (True, False, "async"):
        problems.append(f"save_distributed_checkpoint={save_distributed_checkpoint!r} is neither a bool nor 'async'")
    if hang_timeout is not None and not (isinstance(hang_timeout, int | float) and hang_timeout >= 5):
        problems.append(f"hang_timeout={hang_timeout!r} must be a number of seconds, at least 5, or None for never")
    elif hang_timeout is not None and hang_timeout >= timeout.total_seconds():
        problems.append(
            f"hang_timeout={hang_timeout!r} would never be reached: collectives give up after timeout={timeout} "
            f"({timeout.total_seconds():g} s); make one smaller, or the other larger"
        )
    if problems:
        raise ConfigurationError.of("DualPipeStrategy cannot be built", problems)


def check_run(
    schedule: str,
    layout: ParallelLayout,
    *,
    dispatcher: str,
    devices: Sequence[torch.device],
    precision: str,
    recipe: Recipe | None,
    syncs_batchnorm: bool,
    started: int | None,
) -> None:
    """One error that lists every problem of this Trainer with this strategy.

    Args:
        recipe: of products in FP8.
        started: processes that an earlier Trainer of this program has brought together.
    """
    problems = layout.problems()
    if started not in (None, layout.world):
        problems.append(
            f"this program was started for {started} processes, and this Trainer asks for {layout.world}; give all "
            "its Trainers the same devices and num_nodes, or run this one in a program of its own"
        )
    if schedule == "dualpipe" and layout.pipeline > 1 and layout.pipeline % 2:
        even = [str(size) for size in range(2, layout.world + 1, 2) if layout.world % size == 0]
        instead = f"pipeline_parallel_size={' or '.join(even)}" if even else "an even number of processes"
        problems.append(
            f"dualpipe needs an even number of pipeline ranks, got {layout.pipeline}; "
            f"use schedule='dualpipev', which takes any, or {instead}"
        )
    if any(device.type == "mps" for device in devices):
        problems.append(
            "MPS devices cannot talk to one another and have no float64, in which losses are summed; "
            "use accelerator='cpu' or CUDA devices"
        )
    if syncs_batchnorm:
        problems.append(
            "sync_batchnorm=True has no meaning here: microbatches of one batch never meet in a layer; remove it"
        )
    if precision.startswith("16"):
        problems.append(
            f"precision={precision!r} would let ranks skip different steps, and sums of losses overflow float16; "
            "use precision='bf16-mixed' or 'bf16-true'"
        )
    if precision.startswith("transformer-engine"):
        problems.append(
            f"precision={precision!r} is Lightning's own, which scales by the largest values of earlier steps; ranks "
            "that hold different layers cannot agree on those. Leave precision out, and give the Trainer "
            "plugins=[lightning_dualpipe.FP8Precision()]"
        )
    if isinstance(recipe, Delayed) and not problems:
        num_stages = build_schedule(program_name(schedule, layout), layout.pipeline, 1).num_stages
        if num_stages > 1:
            problems.append(
                f"recipe='delayed' scales by the largest values of earlier microbatches, which the {num_stages} stages "
                "of this pipeline see in different orders, so that results would depend on the layout; use "
                "recipe='block', or 'current', whose scales come from the tensors themselves"
            )
    if devices and layout.expert > 1 and not layout.problems():
        refused = why_not(dispatcher, layout, device=devices[0], dtype=dtype_of(precision))
        problems += [refused] if refused else []
    if problems:
        raise ConfigurationError.of(f"strategy {schedule!r} cannot run", problems)


def dtype_of(precision: str) -> torch.dtype:
    """What layers compute in; under autocast what passes between them has the parameters' type."""
    return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)


def check_model(owner: LightningModule, schedule: str, layout: ParallelLayout) -> bool:
    """Raise what every rank would raise when it cuts the model; one that is built later is left to them.

    Returns whether it is built.
    """
    try:
        _, model = find_pipeline_model(owner)
    except ConfigurationError:
        if is_overridden("configure_model", owner) or is_overridden("setup", owner):
            return False
        raise
    layers = as_layers(model.layers())
    placement = build_schedule(program_name(schedule, layout), layout.pipeline, 1).placement
    Whole.of(owner, layers, partition(layers, placement))
    check_experts(owner, layout)
    return True


def check_callbacks(trainer: Trainer, layout: ParallelLayout) -> None:
    """Refuse those that copy the module in their ``setup``, which runs before the strategy's."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    copying = [type(each).__name__ for each in callbacks if type(each).setup in _COPIES_THE_MODULE]
    if copying and (layout.pipeline > 1 or layout.expert > 1):
        raise ConfigurationError(
            f"{copying[0]} copies the model before it is cut for pipeline_parallel_size={layout.pipeline} and "
            f"expert_parallel_size={layout.expert}, and so averages other tensors than are trained; remove the "
            "callback, or average checkpoints of the run"
        )


_COPIES_THE_MODULE = (StochasticWeightAveraging.setup, WeightAveraging.setup)
