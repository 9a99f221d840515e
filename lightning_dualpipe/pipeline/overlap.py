"""A forward and a backward of two microbatches at once, on one thread: each computes while the other's tokens travel.

Both are generators that stop after every step (``pipeline.stage``). Which of them goes on is a table,
a string of turns that repeats until both are done:

    F   the next step of the forward: compute, or launch a communication
    B   the next step of the backward
    W   the weight gradients that the backward has put aside

``traced`` is the order in which DeepSeek's own trace launches a layer on a GPU, where a launch returns
at once: combine(B) attention(F) experts(B) dispatch(F) dispatch(B) experts(W) experts(F) attention(B)
attention(W) combine(F). The backward of the experts comes before the forward's dispatch, because that
one makes the host wait for counts of tokens, and the GPU needs something to do meanwhile.

``eager`` is for CPUs, where the host computes: communicate as soon as possible.

No matter how long the two are: when one is done the other goes on alone. All ranks that exchange
tokens follow the same table through stages of the same layers, so their collectives meet.
"""

from collections.abc import Callable, Generator
from itertools import chain, cycle
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dualpipe.interface import Values

__all__ = ["ORDERS", "LaunchOrder", "launch_order", "run_pair"]

Result = Values | dict[str, Tensor]


class LaunchOrder(NamedTuple):
    """The backward leads, so that its first tokens are on their way when the forward begins."""

    lead: str
    turns: str


ORDERS = {
    "traced": LaunchOrder("B", "BFBFBWFBWF"),
    "eager": LaunchOrder("BB", "FFBBW"),
}


def launch_order(device: torch.device) -> LaunchOrder:
    """The one for this kind of device."""
    return ORDERS["traced" if device.type == "cuda" else "eager"]


def run_pair(
    forward: Generator[None, None, Result] | None,
    backward: Generator[None, None, Result] | None,
    *,
    weights: Callable[[], None],
    forward_done: Callable[[Result], None],
    backward_done: Callable[[Result], None],
    order: LaunchOrder,
) -> None:
    """Run both to their ends; either may be missing. Each result is handed on as soon as it is there.

    What is put aside last is computed at the very end, after both results have been handed on.
    """
    running = {"F": (forward, forward_done), "B": (backward, backward_done)}
    for turn in chain(order.lead, cycle(order.turns)):
        if turn == "W":
            weights()
            continue
        steps, done = running[turn]
        if steps is not None:
            try:
                next(steps)
            except StopIteration as end:
                running[turn] = (None, done)
                done(end.value)
        if not any(steps for steps, _ in running.values()):
            break
    weights()
