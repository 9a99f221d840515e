"""Layer times from a model's FLOPs and bytes.

    compute     = (FLOPs / matmul rate  +  bytes / memory bandwidth) x slowdown
    all-to-all  = rows x seconds per row  +  bytes / the slower link                        (``routing``)

bytes: every matrix product reads and writes its activations, and one elementwise kernel (norm,
quantisation, SwiGLU, copying into the order of the experts) passes over them once more; weights are
read once. Backward touches values and gradients; attention's own backward is 5 products for 2.

The slowdown is the one number here that no data sheet or kernel benchmark gives: kernels that are
not at their best shape, 20 of 132 multiprocessors lent to communication, gaps between launches. It
is what makes the six compute phases of DeepSeek's trace (``profile.DEEPSEEK``, H800, FP8) add up to
what was measured. Everything else predicted with it, other precisions, hardware and layouts, is a
prediction.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_dualpipe.planner.hardware import Hardware, Precision
from lightning_dualpipe.planner.model import LayerShape, ModelShape, Work
from lightning_dualpipe.planner.routing import journey
from lightning_dualpipe.planner.times import LayerTimes

__all__ = ["SLOWDOWN", "Conditions", "estimate_layers"]

SLOWDOWN = 1.675  # tests/planner/test_calibration.py derives it

_PASSES = 2  # over activations, per use
_SCALES = 4 / 128  # bytes of FP8 scales per value: one float for 128


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the times of a layer depend on, besides the layer."""

    model: ModelShape
    hardware: Hardware
    precision: Precision
    tokens: int  # of one microbatch
    expert_parallel: int
    recompute: bool

    @property
    def fp8(self) -> bool:
        return self.precision == "fp8"


def estimate_layers(layers: Iterable[LayerShape], given: Conditions) -> tuple[LayerTimes, ...]:
    sent, returned = _all_to_alls(given)
    return tuple(_layer(layer, given, sent, returned) for layer in layers)


def _layer(layer: LayerShape, given: Conditions, sent: float, returned: float) -> LayerTimes:
    attention, feed_forward = layer.attention, layer.feed_forward
    near = layer.dense + layer.experts // given.expert_parallel  # parameters here; nearly all are the feed-forward's
    return LayerTimes(
        attention_forward=_forward(attention, given, parameters=0),
        attention_input=_input(attention, given, parameters=0),
        attention_weight=_weight(attention, given, parameters=0),
        experts_forward=_forward(feed_forward, given, parameters=near),
        experts_input=_input(feed_forward, given, parameters=near),
        experts_weight=_weight(feed_forward, given, parameters=near),
        dispatch_forward=layer.routed * sent,
        combine_forward=layer.routed * returned,
        combine_backward=layer.routed * sent,
        dispatch_backward=layer.routed * returned,
    )


def _forward(work: Work, given: Conditions, *, parameters: int) -> float:
    return _compute(given, work.matmul, work.plain + work.core, work.values, parameters)


def _input(work: Work, given: Conditions, *, parameters: int) -> float:
    matmul = work.matmul + (work.again if given.recompute else 0)
    return _compute(given, matmul, work.plain + 2.5 * work.core, 2 * work.values, parameters)


def _weight(work: Work, given: Conditions, *, parameters: int) -> float:
    return _compute(given, work.matmul, work.plain, work.values, parameters)


def _compute(given: Conditions, matmul: float, plain: float, values: float, parameters: int) -> float:
    hardware, tokens = given.hardware, given.tokens
    products = matmul / hardware.matmul_rate(given.precision) + plain / hardware.matmul_rate("bf16")
    touched = tokens * values * _PASSES * 2 + parameters * (1 if given.fp8 else 2)
    return SLOWDOWN * (tokens * products + touched / hardware.memory_bandwidth)


def _all_to_alls(given: Conditions) -> tuple[float, float]:
    """Seconds of sending tokens out, FP8 where training is, and of fetching results back, always BF16."""
    if given.expert_parallel == 1 or not given.model.num_experts:
        return 0.0, 0.0
    way = journey(given.model, given.expert_parallel, given.hardware)
    width = given.model.hidden
    out = width * (1 + _SCALES if given.fp8 else 2)
    return way.seconds(out, given.tokens, given.hardware), way.seconds(2 * width, given.tokens, given.hardware)
