"""Learning rates as functions of the optimizer steps and tokens so far.

report (arXiv:2412.19437, section 4.2)            cosine
2.2e-4 ┤   ┌──────────────────╮                   peak ┤  ╭──╮
       │  ╱                    ╲                       │ ╱    ╲
2.2e-5 ┤ ╱                      ╲______                │╱      ╲
7.3e-6 ┤╱                              ─────    floor  ┤        ╲___
        2K steps   10T       4.3T  333B  167B          warmup   total
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["LearningRateSchedule", "learning_rate_factor"]

LearningRateSchedule = Literal["constant", "cosine", "report"]


@dataclass(frozen=True, slots=True)
class _Report:
    """The last three fields are fractions of the peak, 2.2e-4."""

    constant_tokens: float = 10e12
    decay_tokens: float = 4.3e12
    floor_tokens: float = 333e9
    floor: float = 2.2e-5 / 2.2e-4
    final: float = 7.3e-6 / 2.2e-4

    def __call__(self, tokens: float) -> float:
        into_decay = (tokens - self.constant_tokens) / self.decay_tokens
        if into_decay <= 1:
            return _cosine(max(into_decay, 0.0), floor=self.floor)
        return self.floor if tokens < self.constant_tokens + self.decay_tokens + self.floor_tokens else self.final


def learning_rate_factor(
    schedule: LearningRateSchedule, *, warmup_steps: int, total_steps: int | None, floor: float = 0.1
) -> Callable[[int, Callable[[], float]], float]:
    """``(steps, tokens) -> fraction of the peak learning rate``; ``tokens()`` is asked only where it matters.

    ``cosine`` falls to ``floor`` at ``total_steps``; ``report`` follows the tokens consumed.

    Raises:
        ConfigurationError: unknown name, or a cosine without a known end.
    """
    if schedule not in ("constant", "cosine", "report"):
        raise ConfigurationError(f"learning_rate_schedule={schedule!r} is not one of constant, cosine, report")
    if schedule == "cosine" and (total_steps is None or total_steps <= 0):
        raise ConfigurationError(
            "learning_rate_schedule='cosine' needs to know at which step it ends, which max_time does not tell; "
            "set max_steps or max_epochs in the Trainer, or take learning_rate_schedule='constant'"
        )
    report = _Report()

    def factor(steps: int, tokens: Callable[[], float]) -> float:
        warm = min((steps + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
        if schedule == "report":
            return warm * report(tokens())
        if schedule == "cosine" and steps > warmup_steps:
            assert total_steps is not None
            return _cosine(min((steps - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0), floor=floor)
        return warm

    return factor


def _cosine(progress: float, *, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
