"""What a run leaves behind, and where: checkpoint, metrics, and two pictures; and what memory it took.

checkpoint         runs/quickstart/version_0/checkpoints/last.ckpt
metrics log        runs/quickstart/version_0/metrics.csv
loss picture       runs/quickstart/version_0/losses.png
schedule picture   runs/quickstart/version_0/schedule.png
peak memory        1.31 GiB on rank 2; 0.97 GiB on rank 1, the least of 4
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_dualpipe.callbacks.loss_picture import draw_losses
from lightning_dualpipe.callbacks.peak_memory import GIB, peak_of_ranks
from lightning_dualpipe.callbacks.report_steps import report_is_due
from lightning_dualpipe.errors import MissingPackageError
from lightning_dualpipe.schedules import Costs, Schedule, build_schedule
from lightning_dualpipe.schedules.draw import draw_picture

__all__ = ["RunReport"]

# The training loss that compares with the validation loss comes first: ``train_loss`` has further terms in it.
_TRAINING_LOSSES = ("train_next_token_loss", "train_loss")
_VALIDATION_LOSS = "val_loss"


class RunReport(Callback):
    """At the end of ``fit``, draws the loss curves and the schedule, and says where everything is.

    Also the peak memory of the rank with the largest and of that with the least.

    The curves are part of checkpoints, so that a resumed run shows all of its history.
    """

    def __init__(self) -> None:
        self.training: list[tuple[int, float]] = []
        """(optimizer steps, loss): the first step, then every ``log_every_n_steps``"""
        self.validation: list[tuple[int, float]] = []
        """(optimizer steps, loss), after each validation"""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.training or report_is_due(trainer, last=self.training[-1][0]):
            self._record(self.training, trainer, *_TRAINING_LOSSES)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._record(self.validation, trainer, _VALIDATION_LOSS)

    def _record(self, curve: list[tuple[int, float]], trainer: Trainer, *names: str) -> None:
        metrics = trainer.callback_metrics
        for name in names:
            if name in metrics:
                curve.append((trainer.global_step, float(metrics[name])))
                return

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"training": list(self.training), "validation": list(self.validation)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training = [(step, loss) for step, loss in state_dict["training"]]
        self.validation = [(step, loss) for step, loss in state_dict["validation"]]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank: rank 0 tells the others
        memory = "peak memory", _spread(peak_of_ranks(trainer))
        if trainer.is_global_zero:
            found = [*_checkpoints(trainer), *_metrics_logs(trainer), *self._pictures(trainer, folder), memory]
            width = max((len(what) for what, _ in found), default=0)
            rank_zero_info("\n".join(["", *(f"{what.ljust(width)}   {where}" for what, where in found)]))

    def _pictures(self, trainer: Trainer, folder: Path) -> Iterator[tuple[str, str]]:
        folder.mkdir(parents=True, exist_ok=True)
        schedule = _training_schedule(trainer)
        try:
            if self.training or self.validation:
                yield "loss picture", _shown(draw_losses(self.training, self.validation, folder / "losses.png"))
            if schedule is not None:
                yield "schedule picture", _shown(draw_picture(schedule, Costs(), folder / "schedule.png"))
        except MissingPackageError as error:
            yield "pictures", f"none: {error}"


def _checkpoints(trainer: Trainer) -> Iterator[tuple[str, str]]:
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    paths = [path for callback in callbacks for path in (callback.best_model_path, callback.last_model_path) if path]
    by_file = {os.path.realpath(path): path for path in paths}  # last.ckpt may be a link to the other
    for path in by_file.values():
        yield "checkpoint", _shown(path)


def _metrics_logs(trainer: Trainer) -> Iterator[tuple[str, str]]:
    def place(logger: Logger) -> str | None:
        return logger.experiment.metrics_file_path if isinstance(logger, CSVLogger) else logger.log_dir

    for where in filter(None, map(place, trainer.loggers)):
        yield "metrics log", _shown(where)


def _training_schedule(trainer: Trainer) -> Schedule | None:
    """That of the last training step, where there was one and the strategy is a pipeline of several ranks."""
    strategy: Any = trainer.strategy
    microbatches, layout = getattr(strategy, "num_microbatches_used", None), getattr(strategy, "layout", None)
    if microbatches is None or layout is None or layout.pipeline < 2:
        return None
    return build_schedule(strategy.schedule, layout.pipeline, microbatches)


def _spread(peaks: list[int]) -> str:
    """Bytes by rank: the largest and the least. Ranks of a pipeline differ, by their layers and by what they hold."""
    most, least = max(peaks), min(peaks)
    if len(peaks) == 1:
        return f"{most / GIB:.2f} GiB"
    return (
        f"{most / GIB:.2f} GiB on rank {peaks.index(most)}; "
        f"{least / GIB:.2f} GiB on rank {peaks.index(least)}, the least of {len(peaks)}"
    )


def _shown(path: str | Path) -> str:
    """Relative to where the user stands, if it is below."""
    path, here = Path(path).absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
