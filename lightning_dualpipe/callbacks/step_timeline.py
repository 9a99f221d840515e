"""One step as it really ran: every rank's time, piece by piece, beside what the schedule promises.

timeline_step10.png, .svg     a picture: measured lanes above simulated ones
timeline_step10.json          a Chrome trace, for https://ui.perfetto.dev
timeline_step10.txt           a table: computing, bubble and exposed communication of every rank
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.schedules.draw_record import draw_record, record_table
from lightning_dualpipe.schedules.record import StepRecord
from lightning_dualpipe.schedules.trace import write_record_trace

__all__ = ["RecordsSteps", "StepTimeline"]


@runtime_checkable
class RecordsSteps(Protocol):
    """A strategy that runs a schedule, such as ``DualPipeStrategy``. Every rank calls both."""

    def record_step(self) -> None:
        """Record the next run of the schedule."""
        ...

    def recorded_step(self) -> StepRecord | None:
        """On rank 0 that record of all ranks; None if there was no run."""
        ...


class StepTimeline(Callback):
    """Records the ``step``-th optimizer step of a fit, counted from 1, and then every ``every_n_steps``-th.

    Where gradients are accumulated, the first batch of that step is recorded. Logs three shares of the time of
    all ranks: ``bubble``, ``exposed_communication`` and ``simulated_bubble``. Loggers also get ``timeline_step``, the
    number in the names of the files: Lightning itself counts the rows of its loggers from 0.

    Args:
        step: the first steps of a run are slower than those to come.
        every_n_steps: None for this one alone.
    """

    def __init__(self, step: int = 10, every_n_steps: int | None = None) -> None:
        problems = [
            f"{name}={value}: steps are counted from 1"
            for name, value in (("step", step), ("every_n_steps", every_n_steps))
            if value is not None and value < 1
        ]
        if problems:
            raise ConfigurationError.of("StepTimeline cannot record that", problems)
        self.step = step
        self.every_n_steps = every_n_steps
        self._due: int | None = None  # the number of the next optimizer step to record
        self._recording = False
        self._began = 0  # optimizer steps before this fit

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._recording = trainer.global_step, False
        self._due = self._began + self.step
        if not isinstance(trainer.strategy, RecordsSteps):
            self._due = None
            rank_zero_warn(
                f"StepTimeline records steps of a pipeline, and {type(trainer.strategy).__name__} runs none: there "
                'will be no timeline. Trainer(strategy="dualpipe") has one'
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        strategy: object = trainer.strategy
        if self._due is not None and trainer.global_step + 1 >= self._due and isinstance(strategy, RecordsSteps):
            self._recording = True
            strategy.record_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._recording:
            return
        self._recording = False
        strategy: object = trainer.strategy
        assert isinstance(strategy, RecordsSteps) and self._due is not None
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank: rank 0 tells the others
        record = strategy.recorded_step()
        shares = trainer.strategy.broadcast(record.shares() if record is not None else None)
        if shares is None:  # the model was not called: the next batch then
            return
        step = self._due
        self._due = step + self.every_n_steps if self.every_n_steps is not None else None
        pl_module.log_dict(shares, logger=False)
        for logger in trainer.loggers:  # Lightning would leave it out of steps between log_every_n_steps
            # in the row that has the loss of this step, and with the number that the files have
            logger.log_metrics({**shares, "timeline_step": step}, step=step - 1)
        if record is not None:
            files = list(_write(record, folder, f"timeline_step{step}"))
            rank_zero_info("\n".join([f"step {step}: {record_table(record)}", *files]))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due != self._began + self.step:  # it has recorded a step, or has said that there is none
            return
        made = trainer.global_step - self._began
        if made < self.step:
            why = f"this fit ended after {made} optimizer steps, before its step={self.step}; give a smaller one"
        else:
            why = "no training step called the model"
        rank_zero_warn(f"StepTimeline has recorded nothing: {why}")


def _write(record: StepRecord, folder: Path, name: str) -> Iterator[str]:
    """The names of what was written, and why the rest was not."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{name}.txt"
    table.write_text(record_table(record))
    yield f"table      {table}"
    yield f"trace      {write_record_trace(record, folder / f'{name}.json')}"
    try:
        for suffix in ("png", "svg"):
            yield f"picture    {draw_record(record, folder / f'{name}.{suffix}')}"
    except MissingPackageError as error:
        yield f"pictures   none: {error}"
