"""What a thread of this rank waits for, and for which ranks: read off its stack, so that it costs nothing until then.

in 3F7 for the activations of microbatch 7 from stage 2        for rank 1
in all_reduce, called by gradient_norm (parallel/grad_norm.py)  for ranks 0, 2, 3
in the data loader: __getitem__ (train.py:40)                   for nobody
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType

import torch.distributed as dist

from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.schedules import Action, Kind, Message

__all__ = ["Waiting", "waiting"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """``ranks`` may have to come first; none: this rank itself has work to do."""

    what: str
    ranks: tuple[int, ...] = ()


# A work that is waited for there has no Python frame of its own.
_WAITS_FOR = {
    "early_sums.py": "the sums of gradients",
    "buckets.py": "sums over the holders of a parameter",
    "share.py": "new values of parameters",
    "all_to_all.py": "tokens of experts",
    "dispatch.py": "tokens of experts",
    "node_dispatch.py": "tokens of experts",
    "relay.py": "tokens of experts",
    "deepep.py": "tokens of experts",
    "transport.py": "what it has sent to be taken",
}


def waiting(frame: FrameType | None) -> Waiting:
    """``frame``: the innermost of the thread, which must stand still: its variables are looked at."""
    stack = list(_outwards(frame))
    if not stack:
        return Waiting("has ended")
    for each in stack:
        transport, message = each.f_locals.get("self"), each.f_locals.get("message")
        if each.f_code.co_name == "take" and isinstance(transport, Transport) and isinstance(message, Message):
            return _for_message(transport, message, stack)
    outer = next((each for each in stack if not _is_torch_distributed(each)), None)
    if outer is not stack[0] and outer is not None:
        names = [each.f_code.co_name for each in stack[: stack.index(outer)]]
        called = next((name for name in reversed(names) if name != "wrapper"), names[0])  # of a logging decorator
        return Waiting(f"in {called}, called by {_place(outer)}{_during(stack)}", _members(stack))
    file = PurePath(stack[0].f_code.co_filename)
    if file.name in _WAITS_FOR and file.parent.name in ("parallel", "pipeline"):
        return Waiting(f"for {_WAITS_FOR[file.name]}{_during(stack)}", _others(range(dist.get_world_size())))
    loading = any("/torch/utils/data/" in each.f_code.co_filename for each in stack)
    return Waiting(f"in {'the data loader: ' if loading else ''}{_place(stack[0])}{_during(stack)}")


def _for_message(transport: Transport, message: Message, stack: Sequence[FrameType]) -> Waiting:
    forward = message.kind is Kind.FORWARD
    stage = message.target_stage - 1 if forward else message.target_stage + 1
    what = "activations" if forward else "gradients"
    group = transport.group if transport.group is not None else dist.group.WORLD
    assert group is not None
    source = dist.get_global_rank(group, message.source_rank)
    where = _during(stack).removeprefix(", ") or "in a pipeline"
    return Waiting(f"{where} for the {what} of microbatch {message.microbatch} from stage {stage}", (source,))


def _during(stack: Sequence[FrameType]) -> str:
    """The action of the schedule, if there is one."""
    for each in stack:
        action = each.f_locals.get("action")
        if isinstance(action, Action):
            return f", in {action}"
    return ""


def _members(stack: Sequence[FrameType]) -> tuple[int, ...]:
    """Of the group that a collective is over."""
    for each in stack:
        group = each.f_locals.get("group")
        if isinstance(group, dist.ProcessGroup):
            return _others(dist.get_process_group_ranks(group))
    return _others(range(dist.get_world_size()))


def _others(ranks: Sequence[int]) -> tuple[int, ...]:
    return tuple(rank for rank in ranks if rank != dist.get_rank())


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_torch_distributed(frame: FrameType) -> bool:
    return "/torch/distributed/" in frame.f_code.co_filename


def _place(frame: FrameType) -> str:
    file = PurePath(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({file.parent.name}/{file.name}:{frame.f_lineno})"
