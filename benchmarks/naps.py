"""Compute and communication that take a known time, for benchmarks of what is around them.

Compute is a nap: the ideal is known then, and several ranks can share a core. Communication is a real
all-to-all over gloo, of few bytes, that is not done before its time has passed on the rank's wire; a
wire carries one thing at a time. A nap ends late on a busy machine; how late is counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dualpipe.interface import Flight, Phase, Values, WeightGradients
from lightning_dualpipe.parallel.flight import fly

__all__ = ["LAYER_MS", "Clock", "ExpertLayer", "LayerTimes", "Sleeper", "sleep_until"]


@dataclass
class Clock:
    """How long a unit takes; how many naps there were so far, how long they should be and how late they ended.

    On paper (``virtual``) time passes at once, and nothing else takes any.
    """

    seconds: float = 0.0
    virtual: bool = False
    pace: float = 1.0  # of all naps and traffic, for a while
    naps: int = 0
    slept: float = 0.0
    late: float = 0.0
    travelled: float = 0.0
    _wire_free: float = 0.0
    _time: float = 0.0

    @property
    def now(self) -> float:
        return self._time if self.virtual else time.monotonic()

    def nap(self, units: float) -> None:
        self.wait_until(self.now + units * self.seconds * self.pace)
        self.naps += 1
        self.slept += units * self.seconds

    def occupy_wire(self, units: float) -> float:
        """When something that is put on the wire now will have passed."""
        self._wire_free = max(self._wire_free, self.now) + units * self.seconds * self.pace
        self.travelled += units * self.seconds
        return self._wire_free

    def wait_until(self, end: float) -> None:
        if self.virtual:
            self._time = max(self._time, end)
        elif end > self.now:  # what has passed already was hidden, and is not late
            self.late += sleep_until(end)

    def reset(self, seconds: float) -> None:
        """Begin anew, with an empty wire."""
        self.seconds, self.naps, self.slept, self.late, self.travelled, self._wire_free = seconds, 0, 0.0, 0.0, 0.0, 0.0


def sleep_until(end: float) -> float:
    """Coarsely, then in short pieces; never spin, for ranks share cores. Returns by how much it was late."""
    while (left := end - time.monotonic()) > 0:
        time.sleep(left - 1e-3 if left > 2e-3 else max(left / 2, 5e-5))
    return max(-left, 0.0)


class _Work(torch.autograd.Function):
    """Takes its time forward and for the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Sleeper") -> Tensor:
        ctx.layer = layer
        layer.clock.nap(layer.forward_units)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.layer.clock.nap(ctx.layer.input_units)
        return grad, None


class _Weight(torch.autograd.Function):
    """A weight whose gradient takes its time, now or when the queue is run."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: "Sleeper") -> Tensor:
        ctx.weight, ctx.layer = weight, layer
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        weight, layer = ctx.weight, ctx.layer

        def compute() -> None:
            layer.clock.nap(layer.weight_units)
            weight.grad = grad if weight.grad is None else weight.grad + grad

        if layer.weight_gradients is not None and layer.weight_gradients.deferring:
            layer.weight_gradients.put(compute)
            return None, None
        layer.clock.nap(layer.weight_units)
        return grad, None


class Sleeper(nn.Module):
    """x + w, slowly: so many units for the forward, the gradient of the input and that of the weight."""

    def __init__(self, clock: Clock, width: int, forward: float = 1, input: float = 1, weight: float = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.weight_gradients: WeightGradients | None = None
        self.clock = clock
        self.forward_units, self.input_units, self.weight_units = forward, input, weight

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = _Work.apply(x, self)
        return moved + _Weight.apply(self.weight, self)


@dataclass(frozen=True)
class LayerTimes:
    """Of one layer with experts: forward, input gradient, weight gradient; and its traffic there and back."""

    attention: tuple[float, float, float]
    experts: tuple[float, float, float]
    dispatch: tuple[float, float]
    combine: tuple[float, float]


LAYER_MS = LayerTimes(
    attention=(4.36, 9.34, 2.39), experts=(4.60, 5.31, 5.06), dispatch=(6.69, 7.49), combine=(8.68, 5.77)
)
"""Milliseconds on an H800 with 64 expert ranks, 4096 tokens: means over the four layers of the training trace in
github.com/deepseek-ai/profile-data (train.json), while a forward and a backward overlap."""


class ExpertLayer(nn.Module):
    """Attention, dispatch, experts, combine, of ``LayerTimes``; [rows, width] in and out."""

    def __init__(self, clock: Clock, width: int, times: LayerTimes, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.attention = Sleeper(clock, width, *times.attention)
        self.experts = Sleeper(clock, width, *times.experts)
        self._clock, self._times, self._group = clock, times, group

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("attend", self.attention),
            Phase("dispatch", self._flown(self._dispatch), launch=self._dispatch),
            Phase("experts", self.experts),
            Phase("combine", self._flown(self._combine), launch=self._combine),
        )

    def forward(self, x: Tensor) -> Tensor:
        values: Values = (x,)
        for phase in self.phases():
            values = phase(values, {})
        return values[0]

    def _dispatch(self, x: Tensor) -> Flight:
        return _OnTheWire(x, self._clock, self._times.dispatch, self._group)

    def _combine(self, x: Tensor) -> Flight:
        return _OnTheWire(x, self._clock, self._times.combine, self._group)

    @staticmethod
    def _flown(launch: Callable[[Tensor], Flight]) -> Callable[[Tensor], Values]:
        return lambda x: fly(launch, x)


class _OnTheWire:
    """Rows on their way to the other ranks of a group; ``units`` there and back."""

    def __init__(self, x: Tensor, clock: Clock, units: tuple[float, float], group: dist.ProcessGroup | None) -> None:
        self._clock, self._units, self._group = clock, units, group
        self._passed = clock.occupy_wire(units[0])
        self._leaving = x.contiguous()
        self._arriving = torch.empty_like(self._leaving) if group is not None else x.clone()
        self._work = None
        if group is not None:
            self._work = dist.all_to_all_single(self._arriving, self._leaving, group=group, async_op=True)

    def land(self) -> Values:
        if self._work is not None:
            self._work.wait()
        self._clock.wait_until(self._passed)
        return (self._arriving,)

    def back(self, gradients: Values) -> Flight:
        return _OnTheWire(gradients[0], self._clock, self._units[::-1], self._group)
