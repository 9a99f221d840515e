"""How long the phases of one layer take for one microbatch, in seconds.

    forward     attention ─► dispatch ─► experts ─► combine
    backward    attention ◄─ dispatch ◄─ experts ◄─ combine          and the weight gradients, for which nobody waits

"experts" is the feed-forward part, shared expert and dense layers included; a layer without routed
experts has all-to-alls of no duration.
"""

from dataclasses import astuple, dataclass

__all__ = ["LayerTimes"]


@dataclass(frozen=True, slots=True)
class LayerTimes:
    attention_forward: float = 0.0
    attention_input: float = 0.0  # gradient of the input, with what is recomputed for it
    attention_weight: float = 0.0
    experts_forward: float = 0.0
    experts_input: float = 0.0
    experts_weight: float = 0.0
    dispatch_forward: float = 0.0
    combine_forward: float = 0.0
    combine_backward: float = 0.0  # the backward of combine sends tokens out, as dispatch does
    dispatch_backward: float = 0.0

    @property
    def compute(self) -> float:
        attention = self.attention_forward + self.attention_input + self.attention_weight
        return attention + self.experts_forward + self.experts_input + self.experts_weight

    @property
    def communication(self) -> float:
        return self.dispatch_forward + self.combine_forward + self.combine_backward + self.dispatch_backward

    def __mul__(self, factors: "LayerTimes") -> "LayerTimes":
        """Phase by phase."""
        return LayerTimes(*(mine * other for mine, other in zip(astuple(self), astuple(factors), strict=True)))

    def over(self, other: "LayerTimes") -> "LayerTimes":
        """Ratio phase by phase; 1 where ``other`` takes no time."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return LayerTimes(*(mine / base if base else 1.0 for mine, base in pairs))

    @classmethod
    def of_milliseconds(cls, **phases: float) -> "LayerTimes":
        return cls(**{name: value / 1000 for name, value in phases.items()})
