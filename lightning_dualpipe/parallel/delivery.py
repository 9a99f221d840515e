"""Sum gradients over replicas at the end of the backward that hands them over, whoever calls it.

As in DDP, it makes no difference whether that is Lightning, ``manual_backward`` or ``loss.backward()``:

    backward ──► begins(): what is summed already goes back to this rank's part of the sum
             ──► gradients are added to ``.grad``
             ──► at the end: summed over all holders, before anybody can look at them
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_dualpipe.parallel.replicas import ReplicaGroups

__all__ = ["Delivery"]


class Delivery:
    """The gradients of ``parameters()``, by the names that ``replicas`` knows; asked for anew each time."""

    def __init__(self, replicas: ReplicaGroups, parameters: Callable[[], Mapping[str, Tensor]]) -> None:
        self._replicas = replicas
        self._parameters = parameters
        self._backward = -1
        self._blocked = False

    def begins(self) -> None:
        """Call within a backward, before any gradient of it has arrived; once or, with several losses, more often."""
        backward: int = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        self._backward = backward
        self._replicas.unsum(self._parameters())
        # what DDP and FSDP use: there is no public way to learn of the end of a backward
        torch.autograd.Variable._execution_engine.queue_callback(self._ends)

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Gradients handed over meanwhile stay this rank's part, until the next backward that is not blocked."""
        self._blocked = True
        try:
            yield
        finally:
            self._blocked = False

    def _ends(self) -> None:
        if not self._blocked:
            self._replicas.sum_gradients(self._parameters())
