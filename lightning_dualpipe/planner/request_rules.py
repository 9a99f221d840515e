"""What has to hold for a request, beyond its types."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lightning_dualpipe.schedules import SCHEDULES

if TYPE_CHECKING:
    from lightning_dualpipe.planner.plan import Request

__all__ = ["request_problems"]


def request_problems(request: Request) -> list[str]:
    """Why it cannot be planned, line by line; empty if it can."""
    return [*_sizes(request), *_schedules(request), *_precision(request)]


def _sizes(request: Request) -> Iterator[str]:
    optional = {
        "pipeline": request.pipeline,
        "expert": request.expert,
        "microbatch_sequences": request.microbatch_sequences,
    }
    sizes = {"gpus": request.gpus, "batch_sequences": request.batch_sequences, **optional}
    for name, size in sizes.items():
        if size is not None and size < 1:
            yield f"{name}={size}: at least 1 is needed"
    if request.pipeline and request.gpus >= 1 and request.gpus % request.pipeline:
        yield f"pipeline={request.pipeline} does not divide gpus={request.gpus}"
    if request.expert and request.model.num_experts and request.model.num_experts % request.expert:
        yield f"expert={request.expert} does not divide the {request.model.num_experts} experts of {request.model.name}"
    for name in ("gradient_bytes", "optimizer_bytes"):
        if getattr(request, name) < 0:
            yield f"{name}={getattr(request, name)}: at least 0 is needed"


def _schedules(request: Request) -> Iterator[str]:
    if not request.schedules:
        yield f"no schedule is given; choose among {', '.join(SCHEDULES)}"
    for name in request.schedules:
        if name not in SCHEDULES:
            near = get_close_matches(name.lower(), SCHEDULES, n=1)
            yield f"schedule={name!r} is none of {', '.join(SCHEDULES)}" + (
                f"; did you mean {near[0]!r}?" if near else ""
            )


def _precision(request: Request) -> Iterator[str]:
    hardware = request.hardware
    if request.precision not in ("fp8", "bf16"):
        yield f"precision={request.precision!r} is neither fp8 nor bf16"
    elif request.precision == "fp8" and hardware.fp8_peak is None:
        yield f"precision='fp8': {hardware.name} has no FP8 matrix units; plan with bf16"
    if request.profile is not None and request.profile.precision != request.precision:
        yield (
            f"precision={request.precision!r}: the profile was measured in {request.profile.precision}; "
            f"plan with precision={request.profile.precision!r}"
        )
