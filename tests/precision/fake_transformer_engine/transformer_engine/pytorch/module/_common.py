"""Weight gradients that wait for ``backward_dw``."""

import queue
from collections.abc import Callable
from typing import Any


class WeightGradStore:
    def __init__(self, delay_wgrad_compute: bool = False, ub_bulk_wgrad: bool = False) -> None:
        self.context: Any = queue.Queue() if delay_wgrad_compute else None
        self.enabled = delay_wgrad_compute

    def delay_wgrad_compute(self) -> bool:
        return self.enabled

    def enable_delay_wgrad_compute(self) -> None:
        self.enabled = True

    def disable_delay_wgrad_compute(self) -> None:
        self.enabled = False

    def put(self, tensors: list[Any], compute: Callable[..., Any]) -> None:
        assert self.enabled, "delay_wgrad_compute is not enabled"
        self.context.put([tensors, compute])

    def pop(self) -> Any:
        assert self.enabled, "delay_wgrad_compute is not enabled"
        if self.context.empty():
            raise RuntimeError("Pop empty queue. No distributed environment detected.")
        tensors, compute = self.context.get()
        return compute(*tensors), tensors
