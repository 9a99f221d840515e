"""What users of optimizers may take for granted on a rank that holds a part of the model only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["clear_gradients_early", "optimizers_may_be_empty"]


@contextmanager
def optimizers_may_be_empty() -> Iterator[None]:
    """An optimizer of an empty list has one group of no parameters, which torch does accept.

    One optimizer for the embedding and one for the rest are a sensible choice of the whole model's user; that
    the embedding is on another rank is no concern of theirs.
    """
    usual: Callable[..., None] = Optimizer.__init__

    @wraps(usual)
    def initialize(self: Optimizer, params: Any, *arguments: Any, **options: Any) -> None:
        listed = params if isinstance(params, Tensor) else list(params)
        nothing: list[dict[str, Any]] = [{"params": []}]
        usual(self, listed if isinstance(listed, Tensor) or listed else nothing, *arguments, **options)

    Optimizer.__init__ = initialize  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.__init__ = usual  # type: ignore[method-assign]


def clear_gradients_early(trainer: Trainer, optimizers: Sequence[Optimizer]) -> None:
    """At the first batch of an accumulation: Lightning clears gradients after the model was called, and until then
    they would take memory twice. Not where somebody looks at them, or has a say in it, when they are cleared.
    """
    module = trainer.lightning_module
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    hooks = [("optimizer_zero_grad", module), *(("on_before_zero_grad", each) for each in (module, *callbacks))]
    first = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0
    if first and module.automatic_optimization and not any(is_overridden(name, owner) for name, owner in hooks):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
