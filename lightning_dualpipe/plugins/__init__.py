"""Plugins for Lightning's Trainer."""

from lightning_dualpipe.plugins.fp8_precision import FP8Precision

__all__ = ["FP8Precision"]
