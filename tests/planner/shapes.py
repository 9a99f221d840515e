"""The models that the tests plan for."""

from functools import cache

from lightning_dualpipe.cli.model_shape import model_shape
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config, Preset
from lightning_dualpipe.planner import HARDWARE, Estimate, LayerShape, ModelShape, Request, make_plan

__all__ = ["moe_layer", "only", "request", "shape"]


@cache
def shape(preset: Preset = "671b", sequence_length: int = 4096, **overrides: object) -> ModelShape:
    config = DeepSeekV3Config.from_preset(preset, **overrides)  # type: ignore[arg-type]
    return model_shape(config, name=preset, sequence_length=sequence_length)


def moe_layer(model: ModelShape) -> LayerShape:
    return next(layer for layer in model.layers if layer.routed)


def request(gpu: str = "h800", **asked: object) -> Request:
    """DeepSeek's cluster and batch, unless asked otherwise."""
    return Request(**{"model": shape(), "hardware": HARDWARE[gpu], "gpus": 2048, "batch_sequences": 15360, **asked})


def only(gpu: str = "h800", *, schedule: str = "dualpipe", **asked: object) -> Estimate:
    """DeepSeek's layout: the one estimate, whether it fits or not."""
    pinned = {"pipeline": 16, "expert": 64, "microbatch_sequences": 1, "schedules": (schedule,)}
    plan = make_plan(request(gpu, **{**pinned, **asked}))
    (estimate,) = (*plan.fitting, *plan.too_large)
    return estimate
