"""What a step does after its last microbatch: sum gradients, update, share the new weights.

    reduce-scatter   gradients, over all replicas          hidden behind the last weight gradients, but for one layer's
    update           every replica its part (ZeRO-1)       bytes / memory bandwidth
    all-gather       BF16 weights                          exposed

A collective over replicas first goes around each node, then every processor exchanges its part with
its peers in other nodes, so the network carries 1 / (replicas in a node) of what NVLink does. Data
ranks are neighbours: replicas of dense parameters fill nodes. Replicas of an expert are ``expert``
ranks apart, so beyond a node's size each stands alone in its node.
"""

from dataclasses import dataclass

from lightning_dualpipe.planner.hardware import Hardware
from lightning_dualpipe.planner.layout import Layout
from lightning_dualpipe.planner.memory import Near, Storage

__all__ = ["Synchronization", "synchronization"]

_GATHERED = 2  # bytes of a weight


@dataclass(frozen=True, slots=True)
class Synchronization:
    """Seconds that nothing hides."""

    reduce: float
    update: float
    gather: float

    @property
    def total(self) -> float:
        return self.reduce + self.update + self.gather


def synchronization(
    layout: Layout, parameters: Near, storage: Storage, hardware: Hardware, *, window: float, num_layers: int
) -> Synchronization:
    """
    Args:
        window: seconds of the weight gradients of a rank's last microbatch.
        num_layers: over which its reductions are spread.
    """
    dense = _Group(layout.replicas, min(hardware.per_node, layout.data), hardware)
    alone = max(1, min(hardware.per_node // layout.expert, layout.data // layout.expert))
    experts = _Group(layout.expert_replicas, alone, hardware)
    once = dense.seconds(parameters.dense) + experts.seconds(parameters.experts)  # one byte of each
    reduce = storage.gradient_bytes * once
    shard = parameters.dense / layout.replicas + parameters.experts / layout.expert_replicas
    touched = shard * (2 * storage.optimizer_bytes + storage.gradient_bytes + _GATHERED)
    return Synchronization(
        reduce=max(reduce - window, reduce / num_layers),
        update=touched / hardware.memory_bandwidth,
        gather=_GATHERED * once,
    )


@dataclass(frozen=True, slots=True)
class _Group:
    size: int
    in_node: int
    hardware: Hardware

    def seconds(self, num_bytes: float) -> float:
        """Of a reduce-scatter or an all-gather of ``num_bytes``."""
        if self.size == 1:
            return 0.0
        inside = (self.in_node - 1) / self.in_node / self.hardware.nvlink
        nodes = self.size / self.in_node
        across = (nodes - 1) / nodes / self.in_node / self.hardware.network
        return num_bytes * max(inside, across)
