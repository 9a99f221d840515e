import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_dualpipe.parallel.groups import Groups, _at_high_priority, create_groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from tests.marks import needs_cuda
from tests.ranks import run_ranks

NAMES = ("world", "world_host", "pipeline", "pipeline_broadcast", "pipeline_host", "data", "data_host", "expert")


def _members(rank, layout):
    """The ranks of each group, found out by talking."""
    groups = Groups.create(layout, rank, timeout=timedelta(seconds=30))
    assert groups.pipeline is None or groups.pipeline not in (groups.pipeline_broadcast, dist.group.WORLD)
    found = {}
    for name in NAMES:
        group = getattr(groups, name)
        told = [torch.zeros((), dtype=torch.int64) for _ in range(1 if group is None else group.size())]
        if group is None:
            told[0] += rank
        else:
            dist.all_gather(told, torch.tensor(rank), group=group)
        found[name] = tuple(map(int, told))
    return found


def test_each_group_has_the_ranks_of_the_layout():
    layout = ParallelLayout(4, pipeline=2, expert=2)
    for rank, found in enumerate(run_ranks(4, _members, layout)):
        pipeline, data = layout.pipeline_ranks(rank), layout.data_ranks(rank)
        assert found["world"] == found["world_host"] == (0, 1, 2, 3)
        assert found["pipeline"] == found["pipeline_broadcast"] == found["pipeline_host"] == pipeline
        assert found["data"] == found["data_host"] == data
        assert found["expert"] == layout.expert_ranks(rank)


def _first_operations(rank):
    """Of a backend that is not gloo, by name: groups on which all ranks have met when they are created."""
    met = []
    backend, all_reduce = dist.get_backend, dist.all_reduce
    dist.get_backend = lambda group=None: "nccl"
    dist.all_reduce = lambda tensor, group=None: (met.append(group), all_reduce(tensor, group=group))
    try:
        groups = Groups.create(ParallelLayout(4, pipeline=2), rank, device=torch.device("cpu"))
    finally:
        dist.get_backend, dist.all_reduce = backend, all_reduce
    return met == [groups.pipeline]


def test_the_first_operation_of_a_pipeline_s_group_is_one_of_all_its_ranks():
    assert run_ranks(4, _first_operations) == [True] * 4


def test_groups_of_one_rank_are_none():
    for rank, found in enumerate(run_ranks(2, _members, ParallelLayout(2, pipeline=2))):
        assert found["pipeline"] == (0, 1) and found["data"] == found["expert"] == (rank,)


def test_a_world_of_one_needs_no_process_group():
    assert not dist.is_initialized()
    groups = Groups.create(ParallelLayout(1), 0)
    assert all(getattr(groups, name) is None for name in NAMES)


def _times_out(rank):
    groups = create_groups([(0, 1)], what="slow", timeout=timedelta(seconds=1))
    if rank == 1:
        dist.barrier()  # in another group: never joins
        return "waited elsewhere"
    try:
        dist.all_reduce(torch.zeros(1), group=groups[0, 1])
    except RuntimeError as error:
        dist.barrier()
        return str(error)


def test_the_timeout_reaches_the_group():
    said, _ = run_ranks(2, _times_out)
    assert "1000ms" in said or "imed out" in said


def _asks_for_priority(rank):
    timeout = timedelta(seconds=30)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="backend_options._timeout")
        group = dist.new_group([0], timeout=timeout, pg_options=_at_high_priority(timeout))
    told = torch.ones(3, device="cuda")
    dist.all_reduce(told, group=group)
    return told.tolist(), group._get_backend(torch.device("cuda")).options.is_high_priority_stream


@needs_cuda
def test_nccl_can_be_asked_to_go_before_the_computation():
    assert run_ranks(1, _asks_for_priority, backend="nccl") == [([1.0, 1.0, 1.0], True)]
