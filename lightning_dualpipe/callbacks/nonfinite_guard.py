"""No NaN and no infinity gets into the weights."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dualpipe.callbacks.nonfinite_report import find_nonfinite
from lightning_dualpipe.callbacks.step_guard import Action, StepGuard, over_ranks
from lightning_dualpipe.errors import TrainingError
from lightning_dualpipe.interface import ReplicaAware

__all__ = ["NonFiniteGuard"]


class NonFiniteGuard(StepGuard):
    """Skips an optimizer step with a loss or a gradient that is not finite, or ends the run before it.

    It says which microbatch of which batch the loss is from, and which gradient was the first in the order of the
    backward, with its stage and ranks. Weights that are not finite themselves end the run in any case.

    What is looked at is the norm of all gradients; clipping reads them again. On a GPU each optimizer step then waits
    for its backward, as it does with a ``GradScaler``.

    Args:
        action: ``skip`` the step with a warning, or ``stop``: raise ``TrainingError`` on all ranks.
        patience: so many steps in a row are skipped; one more stops the run.
    """

    metric = "skipped_nonfinite"

    def __init__(self, action: Action = "skip", patience: int = 3) -> None:
        super().__init__(action, patience)

    @override
    def _trouble(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, losses: list[tuple[int, Tensor]]
    ) -> str | None:
        norm = _gradient_norm(trainer, pl_module)
        finite = torch.isfinite(norm)
        for _, loss in losses:
            finite = finite & torch.isfinite(loss).all().to(finite.device)
        if over_ranks(trainer, (~finite).float(), "max") == 0:
            return None
        found = find_nonfinite(trainer, pl_module, losses)
        if found.weights:
            raise TrainingError(f"{type(self).__name__}: optimizer step {trainer.global_step + 1}: {found}")
        return str(found)


def _gradient_norm(trainer: Trainer, module: LightningModule) -> Tensor:
    strategy = trainer.strategy
    if isinstance(strategy, ReplicaAware):
        return strategy.gradient_norm()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).to(module.device)
