"""The names that are imported from here."""

from transformer_engine.pytorch.module.grouped_linear import GroupedLinear
from transformer_engine.pytorch.module.linear import Linear
from transformer_engine.pytorch.quantization import (
    autocast,
    fp8_autocast,
    is_fp8_available,
    is_fp8_block_scaling_available,
    is_mxfp8_available,
)

__all__ = [
    "GroupedLinear",
    "Linear",
    "autocast",
    "fp8_autocast",
    "is_fp8_available",
    "is_fp8_block_scaling_available",
    "is_mxfp8_available",
]
