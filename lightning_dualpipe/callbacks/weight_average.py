"""An exponential moving average of the weights, in host memory and updated beside training.

DeepSeek-V3 keeps one to see early how good the model will be after its learning rate has decayed
(report, section 3.2.3): it costs no device memory and no time.

    step n      ─► copy of this rank's weights ─► thread: average = decay * average + (1 - decay) * copy
    step n + 1  meanwhile

Lightning's ``EMAWeightAveraging`` copies the whole module before it is cut, and so cannot work where no
rank holds all of it. This is that callback, its arguments, decisions and checkpoints included, with
an average of what this rank holds after the cut.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_dualpipe.interface import ReplicaAware

__all__ = ["WeightAverage"]


class WeightAverage(EMAWeightAveraging):
    """Validates with the average, saves it as the weights of checkpoints, and leaves it in the model at the end.

    Args:
        decay: of the average, each time it is updated.
        update_every_n_steps: optimizer steps between two updates.
        update_starting_at_step: no update before this optimizer step.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        super().__init__(
            decay=decay, update_every_n_steps=update_every_n_steps, update_starting_at_step=update_starting_at_step
        )
        self._decay = decay
        self._average: _Average | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: the model is cut later."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is None:  # a checkpoint was not restored before
            self._average = _Average(pl_module, self._decay)
        self._average_model = self._average  # type: ignore[assignment]  # what the base class updates

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average is not None
        self._average.put_into(pl_module)
        self._average = self._average_model = None  # as said in the base class: from here on the model is the average

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._average = self._average_model = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average is not None:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._average.tensors()}
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._average.updates)}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or "current_model_state" not in checkpoint:
            return
        average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
        if isinstance(trainer.strategy, ReplicaAware):
            average, current = (trainer.strategy.local_tensors(each) for each in (average, current))
        if self._average is None:
            self._average = _Average(pl_module, self._decay)
        self._average.restore(average, updates=int(checkpoint["averaging_state"]["n_averaged"]))
        pl_module.load_state_dict(current)

    @override
    def _swap_models(self, pl_module: LightningModule) -> None:
        assert self._average is not None
        self._average.swap(pl_module)


class _Average:
    """Of the floating-point tensors of a module's state dict, at least in float32, by name."""

    def __init__(self, module: LightningModule, decay: float) -> None:
        self.updates = 0
        self._decay = decay
        self._set_aside: dict[str, Tensor] = {}  # the module's own values, while it has the average
        self._values = {
            name: tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in _floating(module).items()
        }
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def update_parameters(self, module: LightningModule) -> None:
        """Returns once the values have been copied, or on a GPU once the copy is in its queue."""
        self._wait()  # one copy at a time: memory for the weights of this rank once
        copies = {name: _to_host(tensor.detach()) for name, tensor in _floating(module).items()}
        copied = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        share = 1.0 - self._decay if self.updates else 1.0
        self.updates += 1
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="weight-average")
        self._running = self._thread.submit(self._add, copies, share, copied)

    def tensors(self) -> dict[str, Tensor]:
        self._wait()
        return self._values

    def restore(self, values: Mapping[str, Tensor], *, updates: int) -> None:
        for name, value in self.tensors().items():
            value.copy_(values[name])
        self.updates = updates

    def put_into(self, module: LightningModule) -> None:
        values = self.tensors()
        for name, tensor in _floating(module).items():
            tensor.detach().copy_(values[name])
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def swap(self, module: LightningModule) -> None:
        """The average into the module; the second time the module's own values back, bit for bit."""
        values, tensors = self._set_aside or self.tensors(), _floating(module)
        self._set_aside = {} if self._set_aside else {name: t.detach().cpu().clone() for name, t in tensors.items()}
        for name, tensor in tensors.items():
            tensor.detach().copy_(values[name])

    @torch.no_grad()
    def _add(self, copies: Mapping[str, Tensor], share: float, copied: "torch.cuda.Event | None") -> None:
        if copied is not None:
            copied.synchronize()
        for name, value in self._values.items():
            value.lerp_(copies[name].to(value.dtype), share)

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None


def _floating(module: LightningModule) -> dict[str, Tensor]:
    state: Mapping[str, Any] = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
