"""A plan for people, as a table, and for programs, as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lightning_dualpipe.planner.plan import Estimate, Plan

__all__ = ["plan_json", "plan_text"]

_FORMAT = "lightning-dualpipe-plan/1"


def plan_text(plan: Plan, *, top: int = 10) -> str:
    """The fastest ``top`` layouts, the recommended one in detail, and why others are not among them."""
    return "\n".join(_lines(plan, top)) + "\n"


def plan_json(plan: Plan, *, top: int = 10) -> str:
    """The same; times are seconds, sizes bytes."""
    request, best = plan.request, plan.recommended
    content = {
        "format": _FORMAT,
        "model": request.model.name,
        "parameters": request.model.parameters,
        "gpu": request.hardware.name,
        "gpus": request.gpus,
        "precision": request.precision,
        "recompute": request.recompute,
        "sequence_length": request.model.sequence_length,
        "batch_sequences": request.batch_sequences,
        "times_from": _source(plan),
        "num_fitting": len(plan.fitting),
        "num_too_large": len(plan.too_large),
        "recommended": None if best is None else _entry(best),
        "fitting": [_entry(one) for one in plan.fitting[:top]],
        "too_large": [{**_entry(one), "reason": _reason(plan, one)} for one in plan.too_large[:top]],
        "impossible": list(plan.impossible),
    }
    return json.dumps(content, indent=1) + "\n"


def _entry(one: Estimate) -> dict[str, Any]:
    layout = one.layout
    return {
        "schedule": layout.schedule,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "expert": layout.expert,
        "microbatch_sequences": layout.sequences,
        "num_microbatches": layout.num_microbatches,
        "step": one.step,
        "compute": one.compute,
        "exposed_communication": one.exposed,
        "communication": one.communication,
        "bubble": one.bubble,
        "synchronization": one.synchronization,
        "tokens_per_second_per_gpu": one.tokens_per_second_per_gpu,
        "gpu_hours_per_trillion_tokens": one.gpu_hours_per_trillion_tokens,
        "mfu": one.mfu,
        "memory": {**asdict(one.memory), "total": one.memory.total},
    }


def _lines(plan: Plan, top: int) -> Iterator[str]:
    request = plan.request
    yield (
        f"{request.model.name}, {request.model.parameters / 1e9:.1f}B parameters, on {request.gpus} x "
        f"{request.hardware.name}, {request.precision}; a step is {request.batch_sequences} sequences of "
        f"{request.model.sequence_length} tokens"
    )
    yield f"layer times: {_source(plan)}"
    yield ""
    num_priced = len(plan.fitting) + len(plan.too_large)
    yield f"{len(plan.fitting)} of {num_priced} layouts fit" + (", the fastest first:" if plan.fitting else "")
    if plan.fitting:
        yield from _table(plan.fitting[:top])
        yield ""
        yield from _recommendation(plan.fitting[0])
    if plan.too_large:
        yield ""
        yield f"too large for {request.hardware.memory / 1e9:.0f} GB, the smallest first:"
        yield from (f"  {one.layout}: {_reason(plan, one)}" for one in plan.too_large[: max(1, top // 3)])
    if plan.impossible:
        yield ""
        yield "impossible:"
        yield from (f"  {reason}" for reason in plan.impossible[:top])
        if len(plan.impossible) > top:
            yield f"  and {len(plan.impossible) - top} more"


_HEADS = (
    *("schedule", "pipeline", "data", "expert", "microbatch", "step s", "bubble", "exposed", "sync"),
    *("tokens/s/GPU", "MFU", "GPU-h/T tokens", "GB"),
)


def _table(estimates: tuple[Estimate, ...]) -> Iterator[str]:
    rows = [_HEADS, *(_cells(one) for one in estimates)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _cells(one: Estimate) -> tuple[str, ...]:
    layout = one.layout
    return (
        layout.schedule,
        str(layout.pipeline),
        str(layout.data),
        str(layout.expert),
        f"{layout.num_microbatches} of {layout.sequences}",
        f"{one.step:.2f}",
        f"{one.bubble / one.step:.1%}",
        f"{one.exposed / one.step:.1%}",
        f"{one.synchronization / one.step:.1%}",
        f"{one.tokens_per_second_per_gpu:.0f}",
        f"{one.mfu:.1%}",
        f"{one.gpu_hours_per_trillion_tokens:,.0f}",
        f"{one.memory.total / 1e9:.1f}",
    )


def _recommendation(one: Estimate) -> Iterator[str]:
    layout = one.layout
    yield (
        f"recommended: DualPipeStrategy(pipeline_parallel_size={layout.pipeline}, "
        f"expert_parallel_size={layout.expert}, schedule={layout.schedule!r}, "
        f"num_microbatches={layout.num_microbatches})"
    )
    hidden = 1 - one.exposed / one.communication if one.communication else 1.0
    yield (
        f"  of {one.step:.2f} s: compute {one.compute:.2f}, expert traffic not hidden {one.exposed:.2f} "
        f"({hidden:.0%} of {one.communication:.2f} is), waiting {one.bubble:.2f}, synchronisation "
        f"{one.synchronization:.2f}"
    )
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in asdict(one.memory).items())
    yield f"  of {one.memory.total / 1e9:.1f} GB: {parts}"


def _reason(plan: Plan, one: Estimate) -> str:
    return f"needs {one.memory.total / 1e9:.1f} GB ({one.memory.largest()})"


def _source(plan: Plan) -> str:
    profile = plan.request.profile
    return "from FLOPs and bytes" if profile is None else f"measured on {profile.gpu}, {profile.source}"
