"""Metrics of torchmetrics see every sample once.

Left alone, a metric collects what all processes have counted. But the ranks of one pipeline are given the
same outputs of the same batches, so each of its samples would count as often as the pipeline has ranks.
"""

import torch.distributed as dist
from torch import nn
from torchmetrics import Metric

__all__ = ["collect_over"]


def collect_over(module: nn.Module, data: dist.ProcessGroup | None) -> None:
    """The metrics of ``module`` collect over the data ranks; over nobody if there is one (``data`` is None).

    A group that the user has given stays. This outlives the Trainer, as the metric's counts do.
    """
    for metric in (each for each in module.modules() if isinstance(each, Metric)):
        if metric.process_group is None and data is not None:
            metric.process_group = data
        elif data is None:
            metric.sync_on_compute = metric.dist_sync_on_step = metric._to_sync = False
