"""A model as the planner sees it: sizes per layer, nothing of its mathematics.

    embed ─► block ─► … ─► block ─► tail                 tail: norm, multi-token prediction and head, never cut apart

Each layer has attention and a feed-forward part, and its experts, if it has any, talk. Where parameters,
FLOPs and kept values come from is the business of whoever makes the value (``cli.planning`` does, from
``deepseek_v3.count``).
"""

from dataclasses import dataclass, field

__all__ = ["Kept", "LayerShape", "ModelShape", "Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """The arithmetic of one token's forward through one part of a layer."""

    matmul: float = 0.0  # FLOPs in the precision of training
    plain: float = 0.0  # FLOPs of products that stay in BF16: head, embedding projections
    core: float = 0.0  # FLOPs of attention itself: BF16, no weights, 2.5 x as much backward (5 products for 2)
    again: float = 0.0  # those of ``matmul`` that backward does again under recomputation
    values: float = 0.0  # activations that enter and leave the matrix products

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.matmul + other.matmul,
            self.plain + other.plain,
            self.core + other.core,
            self.again + other.again,
            self.values + other.values,
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """Values of one token that wait for its backward. ``again``: those that recomputation does not keep."""

    plain: float = 0.0  # two bytes
    cast: float = 0.0  # inputs of matrix products: one byte in FP8, two in BF16
    plain_again: float = 0.0
    cast_again: float = 0.0

    def bytes(self, *, fp8: bool, recompute: bool) -> float:
        plain = self.plain + (0 if recompute else self.plain_again)
        cast = self.cast + (0 if recompute else self.cast_again)
        return 2 * plain + (1 if fp8 else 2) * cast

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(
            self.plain + other.plain,
            self.cast + other.cast,
            self.plain_again + other.plain_again,
            self.cast_again + other.cast_again,
        )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One entry of the list that a pipeline cuts."""

    name: str
    dense: int  # parameters that every data rank holds
    experts: int = 0  # parameters of all routed experts, spread over the expert ranks
    borrowed: int = 0  # parameters of the first layer that this one uses too; a copy, unless both are on one rank
    attention: Work = Work()
    feed_forward: Work = Work()
    kept: Kept = Kept()
    routed: int = 0  # how many times a token passes an all-to-all there and back: 1 with experts
    cost: float = 0.0  # what the pipeline weighs it with when it cuts: forward FLOPs
    with_previous: bool = False  # never cut before this one
    logits: int = 0  # values of one token's predictions, over all heads


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model at one sequence length."""

    name: str
    sequence_length: int
    hidden: int
    num_experts: int
    experts_per_token: int
    num_groups: int  # of experts; a token chooses among the experts of ``groups_per_token`` of them
    groups_per_token: int
    training_flops: float  # per token, forward and backward, nothing counted twice: what MFU means
    layers: tuple[LayerShape, ...] = field(repr=False)

    @property
    def parameters(self) -> int:
        return sum(layer.dense + layer.experts for layer in self.layers)
