"""Tokens on the FP8 grid, on their way to experts and back as gradients; what a dispatcher may send them as.

    x_ND ──round──► dispatch ══FP8══► experts ──► combine ══BF16══► round_gradient ──► y_ND         forward
    dx_ND ◄──────── dispatch ◄══BF16═ experts ◄── combine ◄═FP8════ round ◄────────── dy_ND         backward

Tokens and gradients are rounded one by one, before they are copied, wherever their experts live: also
where nothing travels. So results do not depend on who sends what where, and rows that do travel are on
the grid already: writing them as FP8 values and scales loses nothing (technical report, section 3.3.3).

The experts' own products round rows in the same tiles, and find nothing left to round. The gradient of a
weight rounds other tiles, of 128 tokens; there a value keeps its four significant bits as well, unless it
was less than 2^-14 of the largest one beside it.

Shapes: N tokens, R rows, D width, T tiles of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.recipe import Operand, Recipe
from lightning_dualpipe.precision.reference import Quantised, dequantise, quantise, round_to_grid

__all__ = ["FP8Rows", "SendsTokens", "round_expert_tokens", "travels_exactly"]


@dataclass(frozen=True, slots=True)
class FP8Rows:
    """Rows quantised in pieces of themselves, with scales that are powers of two. A ``parallel.row_format.RowFormat``.

    Raises:
        ConfigurationError: a row and its rounded self could differ in what they are rounded to.
    """

    how: Operand

    def __post_init__(self) -> None:
        tile = self.how.tile
        if tile is None or tile[0] != 1 or self.how.scales != "power_of_two":
            shape = "the whole tensor" if tile is None else f"{tile[0]} x {tile[1]} values"
            raise ConfigurationError(
                f"expert tokens cannot travel in FP8 with {self.how.scales} scales of {shape}: scales must be powers "
                "of two, and of pieces of one row, so that nothing is lost on the way; use recipe='block', or send "
                "tokens in bf16"
            )

    def round(self, x: Tensor) -> Tensor:
        """``x`` [.., D] on the grid, in its own type. The gradient passes as it is."""
        rounded: Tensor = _Round.apply(x, self.how)
        return rounded

    def round_gradient(self, y: Tensor) -> Tensor:
        """``y`` [.., D] as it is. The gradient is rounded."""
        same: Tensor = _RoundGradient.apply(y, self.how)
        return same

    def encode(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """``values_RD`` in FP8 and ``inverse_scales_RT`` in float32, exact for what has been rounded."""
        rows = quantise(x_RD, self.how)
        return rows.values_MK.contiguous(), rows.inverse_scales  # a view would hold the edge of the last tile

    def decode(self, values_RD: Tensor, inverse_scales_RT: Tensor, dtype: torch.dtype) -> Tensor:
        """``x_RD`` in that type."""
        assert self.how.tile is not None
        return dequantise(Quantised(values_RD, inverse_scales_RT, self.how.tile)).to(dtype)


@runtime_checkable
class SendsTokens(Protocol):
    """A mixture of experts."""

    def use_token_format(self, rows: FP8Rows | None) -> None:
        """Round what goes to experts to that grid, and let it travel so; None: leave it as it is."""
        ...


def round_expert_tokens(
    module: nn.Module, recipe: Recipe | None, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Let the mixtures of experts in ``module`` round tokens as ``recipe`` does; returns their names.

    None, or a recipe that quantises nothing: they leave them as they are.

    Args:
        wanted: of the name of one, whether it is meant.

    Raises:
        ConfigurationError: tokens would lose something on the way (see ``travels_exactly``).
    """
    rows = FP8Rows(recipe.activation) if recipe is not None and recipe.activation is not None else None
    if rows is not None and recipe is not None and recipe.gradient != rows.how:
        raise ConfigurationError(f"recipe {recipe.name!r} has another format for gradients; send tokens in bf16")
    senders = [(name, each) for name, each in module.named_modules() if isinstance(each, SendsTokens) and wanted(name)]
    for _, sender in senders:
        sender.use_token_format(rows)
    return [name for name, _ in senders]


def travels_exactly(recipe: Recipe) -> bool:
    """Whether ``round_expert_tokens`` takes this recipe: block and mxfp8, with scales that are powers of two."""
    how = recipe.activation
    one_row = how is not None and how.tile is not None and how.tile[0] == 1
    return how is not None and one_row and how.scales == "power_of_two" and recipe.gradient == how


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Operand) -> Tensor:
        return round_to_grid(x, how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, how: Operand) -> Tensor:
        ctx.how = how
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return round_to_grid(grad, ctx.how), None
