"""How long a stage takes: its phases on two streams, one that computes and one that communicates.

A stream runs what it was given in order, each as soon as its inputs exist. The order in which a
pair is launched is that of DeepSeek's published trace, layer by layer, forward layer ``i`` with
backward layer ``-1 - i``:

    compute         attn(F)  mlp(B)              mlp(W)  mlp(F)    attn(B)  attn(W)
    communication   combine(B)  dispatch(F)  dispatch(B)        combine(F)

    combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F)       launch order

A lone forward has nothing to hide its all-to-alls behind; a lone backward has its weight gradients. What a layer does
not have takes no time, so that stages of unequal lengths and dense layers need no cases.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from lightning_dualpipe.planner.times import LayerTimes

__all__ = ["StageTimes", "pair", "stage_times"]

_NOTHING = LayerTimes()
_ORDER = (
    *("combine_backward", "attention_forward", "experts_input", "dispatch_forward", "dispatch_backward"),
    *("experts_weight", "experts_forward", "attention_input", "attention_weight", "combine_forward"),
)
_BACKWARD_ORDER = tuple(name for name in _ORDER if not name.endswith("_forward"))
_AFTER = {
    "attention_forward": "combine_forward",  # of the layer before
    "dispatch_forward": "attention_forward",
    "experts_forward": "dispatch_forward",
    "combine_forward": "experts_forward",
    "combine_backward": "attention_input",  # of the layer behind
    "experts_input": "combine_backward",
    "dispatch_backward": "experts_input",
    "experts_weight": "experts_input",
    "attention_input": "dispatch_backward",
    "attention_weight": "attention_input",
}
_COMMUNICATES = {name: name.startswith(("dispatch", "combine")) for name in _ORDER}


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Durations of one stage's actions for one microbatch, and what of them is computation."""

    forward: float
    backward: float
    backward_input: float
    backward_weight: float
    compute: float  # of forward and backward together
    communication: float

    def __add__(self, other: "StageTimes") -> "StageTimes":
        return StageTimes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
            self.compute + other.compute,
            self.communication + other.communication,
        )


def pair(forward: Sequence[LayerTimes], backward: Sequence[LayerTimes]) -> float:
    """The forward of some layers together with the backward of others, both listed first layer first."""
    return _run(
        (name, getattr(f if name.endswith("_forward") else b, name))
        for f, b in zip_longest(forward, reversed(backward), fillvalue=_NOTHING)
        for name in _ORDER
    )


def stage_times(layers: Sequence[LayerTimes], *, hide_alone: bool = True) -> StageTimes:
    """
    Args:
        hide_alone: a lone backward computes weight gradients while its all-to-alls run. Otherwise it waits for
            each, as engines do that cannot postpone weight gradients.
    """
    inputs = sum(x.attention_input + x.experts_input + x.combine_backward + x.dispatch_backward for x in layers)
    weights = sum(x.attention_weight + x.experts_weight for x in layers)
    hidden = _run((name, getattr(x, name)) for x in reversed(layers) for name in _BACKWARD_ORDER)
    return StageTimes(
        forward=sum(x.attention_forward + x.experts_forward + x.dispatch_forward + x.combine_forward for x in layers),
        backward=hidden if hide_alone else inputs + weights,
        backward_input=inputs,
        backward_weight=weights,
        compute=sum(x.compute for x in layers),
        communication=sum(x.communication for x in layers),
    )


def _run(launches: Iterable[tuple[str, float]]) -> float:
    free = [0.0, 0.0]  # when the compute and the communication stream are free
    ends: dict[str, float] = {}
    for name, duration in launches:
        end = ends.get(_AFTER[name], 0.0)
        if duration:  # what takes no time waits for its inputs too, but holds up no stream
            stream = _COMMUNICATES[name]
            end = free[stream] = max(end, free[stream]) + duration
        ends[name] = end
    return max(free)
