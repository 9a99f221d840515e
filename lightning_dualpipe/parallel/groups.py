"""The process groups of a layout, as one rank sees them.

Every rank creates all groups, its own and those of others, in the same order. The alternative that
torch offers, ``use_local_synchronization``, names a group after the number of groups a process has
made before, so members with different histories wait for each other for ever; and with NCCL bound
to a device, creating a group is a collective of the whole world in any case.

A group of one rank is None: whoever gets None has nobody to talk to, and needs no process group at
all. (To ``torch.distributed`` None means the whole world, so None must never be passed on.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_dualpipe.parallel.layout import ParallelLayout

__all__ = ["Groups", "create_groups"]

Group = dist.ProcessGroup | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Groups:
    """Whom this rank talks to, and about what. Nothing of a pipeline goes through the world group.

    Those named ``host`` are for objects and tensors in host memory; the others for tensors on the
    device the run computes on. Ranks within a group are in ascending order.
    """

    rank: int
    pipeline_rank: int
    timeout: timedelta | None
    world: Group  # gradient norm, losses
    world_host: Group
    pipeline: Group  # sends and receives between stages, nothing else
    pipeline_broadcast: Group  # what all ranks of a pipeline must know
    pipeline_host: Group  # batches
    data: Group  # token counts, metrics
    data_host: Group
    expert: Group  # tokens on their way to experts and back
    expert_across: Group  # of these, the ranks at one place of each node
    expert_within: Group  # and those on one node

    @classmethod
    def create(
        cls,
        layout: ParallelLayout,
        rank: int,
        *,
        timeout: timedelta | None = None,
        device: torch.device | None = None,
    ) -> Groups:
        """The groups of ``rank``. All ranks of the world call this together; a world of one needs no set-up.

        Args:
            device: what the run computes on.
        """

        def new(
            members: Iterable[tuple[int, ...]], what: str, *, backend: str | None = None, urgent: bool = False
        ) -> Group:
            created = create_groups(sorted(set(members)), what=what, timeout=timeout, backend=backend, urgent=urgent)
            return next(iter(created.values()), None)

        def host(like: Group, members: Iterable[tuple[int, ...]], what: str) -> Group:
            on_host = like is None or dist.get_backend(like) == "gloo"
            return like if on_host else new(members, f"{what}_host", backend="gloo")

        ranks = range(layout.world)
        pipelines, datas = [layout.pipeline_ranks(r) for r in ranks], [layout.data_ranks(r) for r in ranks]
        world = dist.group.WORLD if layout.world > 1 else None
        expert = new([layout.expert_ranks(r) for r in ranks], "expert", urgent=True)
        across, within = None, expert
        if (layout.expert_nodes or 1) > 1:
            across = new(map(layout.expert_ranks_across, ranks), "expert_across", urgent=True)
            within = new(map(layout.expert_ranks_within, ranks), "expert_within", urgent=True)
        broadcast, data = new(pipelines, "pipeline_broadcast"), new(datas, "data")
        pipeline = new(pipelines, "pipeline", urgent=True)
        if pipeline is not None and dist.get_backend(pipeline) != "gloo":
            # with NCCL, the first operation of a group must not be a batch of sends in which some ranks have no part
            dist.all_reduce(torch.zeros((), device=device), group=pipeline)
        return cls(
            rank=rank,
            pipeline_rank=layout.pipeline_rank(rank),
            timeout=timeout,
            world=world,
            world_host=host(world, [tuple(ranks)], "world"),
            pipeline=pipeline,
            pipeline_broadcast=broadcast,
            pipeline_host=host(broadcast, pipelines, "pipeline"),
            data=data,
            data_host=host(data, datas, "data"),
            expert=expert,
            expert_across=across,
            expert_within=within,
        )


def create_groups(
    members: Iterable[tuple[int, ...]],
    *,
    what: str,
    timeout: timedelta | None = None,
    backend: str | None = None,
    urgent: bool = False,
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """One group for each tuple of ranks; returns those with this rank in it.

    Every rank of the world passes the same tuples in the same order. A tuple of one rank gets no group.

    Args:
        urgent: what it carries goes before a computation that has the GPU to itself.
    """
    mine = {}
    for ranks in members:
        if len(ranks) > 1:
            on_nccl = dist.is_nccl_available() and (backend or dist.get_backend()) == "nccl"
            options = _at_high_priority(timeout) if urgent and on_nccl else None
            group = dist.new_group(list(ranks), timeout=timeout, backend=backend, pg_options=options, group_desc=what)
            if dist.get_rank() in ranks:
                mine[ranks] = group
    return mine


def _at_high_priority(timeout: timedelta | None) -> Any:
    """NCCL computes on streams of its own, whatever stream it is called from, and those are of low priority:
    it would wait until the matrix product that fills the GPU leaves it a place.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if timeout is not None:
        options._timeout = timeout  # else torch warns that it sets it
    return options
