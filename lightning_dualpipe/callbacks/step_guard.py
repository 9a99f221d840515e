"""Leave out an optimizer step as if its batches had never been seen, or end the run before it.

    backward ─► on_before_optimizer_step: is there trouble? ─ no ─► clipping, step, schedule
                                                            └ yes ─► gradients are dropped ─► nothing steps

Every rank decides alike, from numbers that are the same on all of them. What a skipped step leaves alone:

    weights, optimizer states      without gradients torch's optimizers leave both as they are
    step count, schedule of rates  Lightning moves them on after each step; they are moved back
    expert biases, token counts    the module takes back what it has counted (``interface.ForgetsSteps``)

The place in the data moves on. Random numbers that were drawn (dropout) and statistics of layers (BatchNorm, FP8's
delayed scaling) stay as the batch has left them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dualpipe.errors import ConfigurationError, TrainingError
from lightning_dualpipe.interface import ForgetsSteps, ReplicaAware

__all__ = ["Action", "StepGuard", "over_ranks"]

Action = Literal["skip", "stop"]


class StepGuard(Callback, ABC):
    """Looks at every optimizer step before it is made.

    Args:
        action: ``skip`` the step with a warning, or ``stop``: raise ``TrainingError`` on all ranks.
        patience: so many steps in a row are skipped; one more stops the run.
    """

    metric: ClassVar[str]
    """Under which the number of skipped steps is logged."""

    def __init__(self, action: Action, patience: int) -> None:
        problems = []
        if action not in get_args(Action):
            problems.append(f"action={action!r} is not one of {', '.join(get_args(Action))}")
        if not (isinstance(patience, int) and patience > 0):
            problems.append(f"patience={patience!r} must be a positive whole number; action='stop' skips none")
        self._refuse(problems)
        self.skipped = 0
        """Optimizer steps, since training began: part of checkpoints."""
        self._action, self._patience = action, patience
        self._in_a_row = 0
        self._losses: list[tuple[int, Tensor]] = []  # batch, loss; of which the next optimizer step is made
        self._stepped = False  # since the last of them; one loss may be for several optimizers
        self._dropped = False  # the optimizer step it has seen last
        self._undo: list[Callable[[], None]] = []  # when the batch is over

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise ConfigurationError.of(f"{type(self).__name__} cannot be built", problems)

    @abstractmethod
    def _trouble(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, losses: list[tuple[int, Tensor]]
    ) -> str | None:
        """What is wrong with this step, the same on every rank; None if nothing is.

        Args:
            losses: of the batches since the last step, with their numbers; divided by how many are accumulated. Where
                several optimizers step after one backward, they are the same for each.
        """

    # ---- hooks --------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                f"{type(self).__name__} has no place beside precision={trainer.precision!r}, which finds its scale by "
                "gradients that overflow, and skips those steps itself; use 'bf16-mixed', or remove the callback"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._undo = [], []
        self._stepped = self._dropped = False

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._stepped:
            self._losses, self._stepped = [], False
        self._losses.append((trainer.fit_loop.epoch_loop.batch_idx, loss.detach()))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepped, self._dropped = True, False
        if any(guard._dropped for guard in self._asked_before(trainer)):
            return
        trouble = self._trouble(trainer, pl_module, optimizer, list(self._losses))
        if trouble is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        what = f"{type(self).__name__}: optimizer step {trainer.global_step + 1}: {trouble}"
        if self._action == "stop":
            raise TrainingError(f"{what}. Nothing of it is in the weights")
        if self._in_a_row > self._patience:
            raise TrainingError(f"{what}. {self._patience} steps in a row were skipped before it")
        self.skipped += 1
        rank_zero_warn(f"{what}. It is skipped; {self.skipped} so far")
        self._dropped = True
        self._undo.append(_drop_step(trainer, pl_module, optimizer))

    def _asked_before(self, trainer: Trainer) -> list["StepGuard"]:
        """The guards that have seen this very step; what those after this one have seen last is the step before."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [each for each in takewhile(lambda each: each is not self, callbacks) if isinstance(each, StepGuard)]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        while self._undo:
            self._undo.pop()()
        pl_module.log(self.metric, float(self.skipped))

    # ---- state --------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def over_ranks(trainer: Trainer, value: Tensor, reduce_op: Literal["max", "mean"]) -> Tensor:
    """Of what each rank has found in its own loss. Under strategies of this package that is the loss of the global
    batch, so that ``value`` is the same on all of them already.
    """
    if isinstance(trainer.strategy, ReplicaAware):
        return value
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return torch.as_tensor(trainer.strategy.reduce(value, group=world, reduce_op=reduce_op))


def _drop_step(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Callable[[], None]:
    """Take the gradients away; returns what is to be done when Lightning has done what follows a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    loop = trainer.fit_loop.epoch_loop
    automatic = module.automatic_optimization
    progress = (
        loop.automatic_optimization.optim_progress.optimizer.step
        if automatic
        else loop.manual_optimization.optim_step_progress
    )
    for count in (progress.total, progress.current):  # Lightning is about to count a step that is none
        count.ready -= 1
        count.completed -= 1
    if isinstance(module, ForgetsSteps):
        module.on_step_skipped()
    # with manual optimization a module steps its schedulers itself
    return partial(_restore, _rates(trainer) if automatic else [])


_Rates = list[tuple[Any, dict[str, Any], list[dict[str, Any]]]]


def _rates(trainer: Trainer) -> _Rates:
    """Schedulers that Lightning steps with the optimizer: their state, and what they have set in their optimizer."""
    return [
        (
            config.scheduler,
            deepcopy(config.scheduler.state_dict()),
            [
                {name: deepcopy(value) for name, value in group.items() if name != "params"}
                for group in config.scheduler.optimizer.param_groups
            ],
        )
        for config in trainer.strategy.lr_scheduler_configs
        if config.interval == "step" and not config.reduce_on_plateau
    ]


def _restore(rates: _Rates) -> None:
    for scheduler, state, groups in rates:
        scheduler.load_state_dict(state)
        for group, before in zip(scheduler.optimizer.param_groups, groups, strict=True):
            for name, value in before.items():
                if isinstance(value, Tensor):  # in place: a captured graph may have it
                    group[name].copy_(value)
                else:
                    group[name] = value
