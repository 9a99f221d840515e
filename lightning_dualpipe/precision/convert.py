"""Letting layers multiply in another number format; their parameters, names and classes stay as they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_dualpipe.precision.grouped_linear import grouped_linear
from lightning_dualpipe.precision.linear import give_back, is_plain, take_over
from lightning_dualpipe.precision.matmul import Backend, HasGroupedMatmuls

__all__ = ["convert", "restore"]


def convert(module: nn.Module, backend: Backend, wanted: Callable[[str, nn.Module], bool]) -> list[str]:
    """Let the linear layers and stacks of experts of ``module`` multiply by ``backend``; returns their names.

    Args:
        wanted: of a name in ``module`` and the layer, whether it is to be converted.
    """
    converted = []
    for name, layer in module.named_modules():
        if not wanted(name, layer):
            continue
        if isinstance(layer, nn.Linear) and is_plain(layer):
            take_over(layer, backend.linear())
            converted.append(name)
        elif isinstance(layer, HasGroupedMatmuls):
            layer.grouped_matmuls = {parameter: backend.grouped_linear() for parameter in layer.grouped_matmuls}
            converted.append(name)
    return converted


def restore(module: nn.Module) -> None:
    """Let all layers of ``module`` multiply in high precision again."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and is_plain(layer):
            give_back(layer)
        elif isinstance(layer, HasGroupedMatmuls):
            layer.grouped_matmuls = dict.fromkeys(layer.grouped_matmuls, grouped_linear)
