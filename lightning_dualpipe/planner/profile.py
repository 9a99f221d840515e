"""Measured layer times: a value, a file, and what follows from them for other layers and conditions.

The file is JSON; times are milliseconds of one layer with experts, in the steady state, where pairs overlap:

    {"format": "lightning-dualpipe-profile/1", "source": "…", "gpu": "h800", "precision": "fp8", "tokens": 4096,
     "expert_parallel": 64, "recompute": true, "milliseconds": {"attention_forward": 4.36, …}}

Measured and estimated time of each phase, at the conditions of the measurement, give a factor. The
planner multiplies its estimates by these factors: at the same conditions it then reproduces the
measurement, and for another microbatch, layout or layer (dense, head) it scales as the estimate does.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.planner.estimate import Conditions, estimate_layers
from lightning_dualpipe.planner.hardware import HARDWARE, Precision, hardware_named
from lightning_dualpipe.planner.model import ModelShape
from lightning_dualpipe.planner.times import LayerTimes

__all__ = ["DEEPSEEK", "Profile"]

_FORMAT = "lightning-dualpipe-profile/1"
_PHASES = tuple(phase.name for phase in fields(LayerTimes))
_REMEDY = "write it with Profile.write, or see docs/planner.md"


@dataclass(frozen=True, slots=True)
class Profile:
    """Times of one layer with experts, and under what conditions they were measured."""

    source: str
    gpu: str
    precision: Precision
    tokens: int
    expert_parallel: int
    recompute: bool
    times: LayerTimes

    def factors(self, model: ModelShape) -> LayerTimes:
        """Measured over estimated, phase by phase. The measurement is taken to be of this model."""
        routed = next((layer for layer in model.layers if layer.routed), None)
        if routed is None:
            raise ConfigurationError(
                f"this profile ({self.source}) is of a layer with experts, and {model.name} has none; plan without it"
            )
        hardware = hardware_named(self.gpu)
        given = Conditions(model, hardware, self.precision, self.tokens, self.expert_parallel, self.recompute)
        return self.times.over(*estimate_layers([routed], given))

    def write(self, path: Path) -> None:
        content = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in _CONDITIONS},
            "milliseconds": {name: 1000 * getattr(self.times, name) for name in _PHASES},
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Raises ConfigurationError with everything that is wrong with the file."""
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"the profile {path} cannot be read as JSON: {error}; {_REMEDY}") from error
        if problems := _problems(content):
            raise ConfigurationError.of(f"the profile {path} cannot be used ({_REMEDY})", problems)
        times = LayerTimes.of_milliseconds(**{name: float(content["milliseconds"][name]) for name in _PHASES})
        return cls(**{name: content[name] for name in _CONDITIONS}, times=times)


_CONDITIONS = {"source": str, "gpu": str, "precision": str, "tokens": int, "expert_parallel": int, "recompute": bool}
_KINDS = {str: "a string", int: "an int", bool: "true or false"}


def _problems(content: Any) -> list[str]:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return [f'its "format" is not {_FORMAT!r}']
    problems = [
        f"{name}={content.get(name)!r}: {_KINDS[kind]} is needed"
        for name, kind in _CONDITIONS.items()
        if type(content.get(name)) is not kind
    ]
    for name in ("tokens", "expert_parallel"):
        if type(content.get(name)) is int and content[name] < 1:
            problems.append(f"{name}={content[name]}: at least 1 is needed")
    if isinstance(content.get("gpu"), str) and content["gpu"] not in HARDWARE:
        problems.append(f"gpu={content['gpu']!r} is none of {', '.join(HARDWARE)}")
    if isinstance(content.get("precision"), str) and content["precision"] not in ("fp8", "bf16"):
        problems.append(f"precision={content['precision']!r} is neither fp8 nor bf16")
    given = content.get("milliseconds")
    if not isinstance(given, dict):
        return [*problems, f"milliseconds={given!r}: an object with {', '.join(_PHASES)} is needed"]
    if missing := [name for name in _PHASES if name not in given]:
        problems.append(f"milliseconds lacks {', '.join(missing)}")
    if unknown := sorted(set(given) - set(_PHASES)):
        problems.append(f"milliseconds has {', '.join(unknown)}, which is none of {', '.join(_PHASES)}")
    problems += [
        f"milliseconds.{name}={value!r}: a finite number, at least 0, is needed"
        for name, value in given.items()
        if name in _PHASES and not (type(value) in (int, float) and 0 <= value < float("inf"))
    ]
    return problems


DEEPSEEK = Profile(
    source="github.com/deepseek-ai/profile-data, train.json (4496024): a pair of 4 MoE layers in 128.5 ms",
    gpu="h800",
    precision="fp8",
    tokens=4096,
    expert_parallel=64,
    recompute=True,
    # Means per layer over the four, kernels told apart by their streams and correlation ids; pipeline traffic is not in
    # the trace, and routing was forced to be balanced.
    times=LayerTimes.of_milliseconds(
        attention_forward=4.36,
        attention_input=9.34,
        attention_weight=2.39,
        experts_forward=4.60,
        experts_input=5.31,
        experts_weight=5.06,
        dispatch_forward=6.69,
        combine_forward=8.68,
        combine_backward=5.77,
        dispatch_backward=7.49,
    ),
)
