"""Which way tokens go to their experts: by name, or the best that works here, with the reason.

all_to_all    one row for every chosen expert                            the bits of one rank
node          one copy per node and rank (``node_dispatch``)             sums agree up to rounding
deepep        the same by DeepEP's kernels (``deepep``)                  bfloat16 on CUDA devices
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.deepep import DeepEPBuffers, DeepEPDispatcher, why_not_deepep
from lightning_dualpipe.parallel.dispatch import AllToAllDispatcher, TokenDispatcher
from lightning_dualpipe.parallel.groups import Groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.parallel.node_dispatch import NodeDispatcher, NodeRoutes

__all__ = ["DISPATCHERS", "DispatcherChoice", "GroupsExperts", "choose_dispatcher", "node_hints", "why_not"]

DISPATCHERS = ("auto", "all_to_all", "node", "deepep")


@dataclass(frozen=True, slots=True)
class DispatcherChoice:
    name: str
    reasons: tuple[str, ...]

    def build(self, groups: Groups) -> Callable[[int], TokenDispatcher]:
        """Makes the dispatcher of a layer from its number of experts. What layers share is made once."""
        assert groups.expert is not None, "experts are spread"
        expert = groups.expert
        if self.name == "deepep":
            buffers = DeepEPBuffers(expert)
            return lambda num_experts: DeepEPDispatcher(num_experts, buffers)
        if self.name == "node":
            routes = NodeRoutes(expert, across=groups.expert_across, within=groups.expert_within)
            return lambda num_experts: NodeDispatcher(num_experts, routes)
        return lambda num_experts: AllToAllDispatcher(num_experts, expert)

    def __str__(self) -> str:
        return f"dispatcher={self.name!r}: " + "; ".join(self.reasons)


def choose_dispatcher(
    wanted: str, layout: ParallelLayout, *, device: torch.device, dtype: torch.dtype
) -> DispatcherChoice:
    """
    Raises:
        ConfigurationError: what was asked for cannot run here.
    """
    refused = why_not(wanted, layout, device=device, dtype=dtype)
    if refused is not None:
        raise ConfigurationError(refused)
    if wanted != "auto":
        return DispatcherChoice(wanted, ("as asked for",))
    nodes = layout.expert_nodes
    no_deepep = why_not_deepep(device, dtype, num_ranks=layout.expert, num_nodes=nodes)
    no_nodes = _why_not_by_node(layout)
    if no_deepep is None:
        return DispatcherChoice("deepep", ("DeepEP is installed and can be used",))
    if no_nodes is not None:
        return DispatcherChoice("all_to_all", (no_nodes, no_deepep))
    where = "each rank" if nodes == 1 else f"each of the {nodes} nodes of an expert group"
    return DispatcherChoice("node", (f"a token is sent to {where} once", no_deepep))


def why_not(wanted: str, layout: ParallelLayout, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """What stands against this dispatcher here; None if nothing does."""
    refused = None
    if wanted == "deepep":
        refused = why_not_deepep(device, dtype, num_ranks=layout.expert, num_nodes=layout.expert_nodes)
    elif wanted == "node":
        refused = _why_not_by_node(layout)
    return refused and f"dispatcher={wanted!r} cannot run: {refused}; dispatcher='auto' takes what can"


@runtime_checkable
class GroupsExperts(Protocol):
    """A router that takes a token's experts from ``top_groups`` of ``num_groups`` groups of neighbouring experts."""

    num_groups: int
    top_groups: int


def node_hints(routers: Sequence[GroupsExperts], layout: ParallelLayout) -> list[str]:
    """Why tokens go to more nodes than they have to (technical report, section 2.1.2: to 4 of 8 at most)."""
    nodes = layout.expert_nodes
    if nodes is None or nodes == 1:
        return []
    hints = []
    for groups, top in sorted({(router.num_groups, router.top_groups) for router in routers}):
        if groups % nodes:
            hints.append(
                f"n_group={groups} does not map onto the {nodes} nodes of an expert group: groups lie across them, and "
                f"topk_group={top} does not limit how many nodes a token is sent to; use a multiple of {nodes}"
            )
        elif top >= nodes:
            hints.append(
                f"topk_group={top} lets a token go to all {nodes} nodes of an expert group; "
                f"less than {nodes} would limit the traffic between them"
            )
    return hints


def _why_not_by_node(layout: ParallelLayout) -> str | None:
    if layout.expert_nodes is not None:
        return None
    return (
        f"expert_parallel_size={layout.expert} ranks do not lie evenly on nodes of {layout.per_node}; "
        "use a divisor or a multiple of that"
    )
