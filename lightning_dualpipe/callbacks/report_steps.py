"""When a callback reports: at the optimizer steps that Lightning's loggers write down."""

from typing import cast

from lightning.pytorch import Trainer

__all__ = ["report_is_due"]

_WITHOUT_LOGGERS = 50  # optimizer steps, where log_every_n_steps=0


def report_is_due(trainer: Trainer, *, last: int) -> bool:
    """Whether a report is due after this batch; ``last`` is the step of the latest one.

    While gradients are accumulated the step stands still, and its report has been made.
    """
    every = cast(int, getattr(trainer, "log_every_n_steps", 0)) or _WITHOUT_LOGGERS
    return trainer.global_step > last and trainer.global_step % every == 0
