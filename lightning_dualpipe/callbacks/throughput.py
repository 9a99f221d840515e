"""Tokens per second of the whole run, in the progress bar and the log."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_dualpipe.callbacks.report_steps import report_is_due
from lightning_dualpipe.metrics.throughput import CountsFlops, TokenRate, flops_utilization, num_tokens

__all__ = ["Throughput"]


class Throughput(Callback):
    """Logs ``tokens_per_second`` over the last ``log_every_n_steps`` optimizer steps.

    Counted are the tokens of the global batch, each once, and the time of training without validation.
    ``mfu``, the share of the hardware's peak, is logged where the module says how much arithmetic a token
    takes (``metrics.throughput.CountsFlops``) and the peak of the device is known.

    Nothing waits for a device between two reports: on a GPU a report tells of work finished, give or
    take what is still in its queue.
    """

    def __init__(self) -> None:
        self.rate = TokenRate()
        self._length = 0
        self._reported_at = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate.pause()
        self.rate.lap()  # of an earlier fit
        self._reported_at = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rate.run()
        if tokens := num_tokens(batch):
            self.rate.add(tokens)
            self._length = batch["input_ids"].shape[-1]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not report_is_due(trainer, last=self._reported_at):
            return
        self._reported_at = trainer.global_step
        tokens, seconds = self.rate.lap()
        if tokens == 0 or seconds <= 0:
            return
        # every data rank has its own tokens; the strategy knows which ranks those are
        counted = torch.tensor(float(tokens), dtype=torch.float64, device=pl_module.device)
        per_second = float(trainer.strategy.reduce(counted, reduce_op="sum")) / seconds
        pl_module.log("tokens_per_second", per_second, prog_bar=True)
        if isinstance(pl_module, CountsFlops):
            flops = per_second * pl_module.training_flops(self._length) / trainer.world_size
            utilization = flops_utilization(flops, device=pl_module.device, dtype=_compute_dtype(trainer))
            if utilization is not None:
                pl_module.log("mfu", utilization)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate.pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rate.run()


def _compute_dtype(trainer: Trainer) -> torch.dtype:
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float64 if precision.startswith("64") else torch.float32
