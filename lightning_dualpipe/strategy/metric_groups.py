"""Metrics of torchmetrics see every sample once.

Left alone, a metric collects what all processes have counted. But the ranks of one pipeline are given the
same outputs of the same batches, so each of its samples would count as often as the pipeline has ranks.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

__all__ = ["collect_over"]


def collect_over(module: nn.Module, data: dist.ProcessGroup | None) -> None:
    """The metrics of ``module`` collect over the data ranks; over nobody if there is one (``data`` is None).

    A group or a function that the user has given stays. This outlives the Trainer, as the metric's counts do.
    """
    for metric in (each for each in module.modules() if isinstance(each, Metric)):
        if data is None:
            metric.sync_on_compute = metric.dist_sync_on_step = metric._to_sync = False
        elif metric.process_group is None and metric.dist_sync_fn is None:
            metric.dist_sync_fn = _Over(data)


class _Over:
    """Gathers over a group. Metrics are copied and saved, which a group cannot be."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, result: Tensor, group: Any | None = None) -> list[Tensor]:
        return gather_all_tensors(result, group or self._group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Over":
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _nothing_given, ()


def _nothing_given() -> None:
    """What a metric has that was never told how to gather."""
