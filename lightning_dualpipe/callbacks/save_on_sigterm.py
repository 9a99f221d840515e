"""A checkpoint before the process ends: when Kubernetes, torchrun or a scheduler takes the machine away.

    SIGTERM, to any rank ─► note ─► end of the batch: all ranks save, then all end with exit code 143

143 is what a shell says of a process that SIGTERM has ended: whoever starts failed jobs again does so, and
``--ckpt_path newest:FOLDER`` goes on from what was saved.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_dualpipe.between_batches import BetweenBatches, written_at_once

__all__ = ["SaveOnSigterm"]

_ECHO_SECONDS = 3.0  # in which a launcher may pass on what the process has got already
_TERMINATED = 128 + signal.SIGTERM


class SaveOnSigterm(BetweenBatches):
    """On SIGTERM, to whichever rank, saves ``dirpath/sigterm.ckpt`` after the batch, and ends all ranks.

    Within an accumulation, after its last batch: gradients are no part of checkpoints. A second SIGTERM, some seconds
    after the first, ends the process at once. Ranks ask each other after every batch, which is one small all-reduce.

    Args:
        dirpath: best the folder of ``ModelCheckpoint``, where ``newest:FOLDER`` looks. A ``sigterm.ckpt`` of an earlier
            interruption is replaced.
    """

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__()
        self.path = Path(dirpath) / "sigterm.ckpt"
        self._first = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning is about to install its handler, which would broadcast in the middle of a batch."""
        self._noted, self._done = 0, False
        trainer._signal_connector._sigterm_notifier_fn = self.note  # type: ignore[method-assign,assignment]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # the last, so that the others have seen the batch; a new list, because this one is being iterated
        trainer.callbacks = [each for each in callbacks if each is not self] + [self]  # type: ignore[attr-defined]

    @override
    def note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted and now - self._first > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._noted:
            self._first = now
            super().note(number, frame)

    @override
    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, *arguments)

    @override
    def _agree(self, trainer: Trainer, noted: int) -> int:
        return signal.SIGTERM if trainer.strategy.reduce_boolean_decision(bool(noted), all=False) else 0

    @override
    def _act(self, trainer: Trainer, number: int) -> None:
        trainer._signal_connector.received_sigterm = True
        if not trainer.testing:
            with written_at_once(trainer.strategy):
                trainer.save_checkpoint(self.path)
            rank_zero_info(f"SIGTERM: {self.path} is saved, at step {trainer.global_step}; all ranks end")
        raise SIGTERMException(_TERMINATED)
