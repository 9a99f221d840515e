"""The helper of the tests is tested too: a test that cannot fail shows nothing."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _sum_of_ranks(rank, addend):
    total = torch.tensor(rank + addend)
    dist.all_reduce(total)
    return total


def test_results_come_in_rank_order_and_tensors_outlive_their_rank():
    assert [int(total) for total in run_ranks(3, _sum_of_ranks, 10)] == [33, 33, 33]


def _fail_on_one(rank):
    if rank == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def _die_on_one(rank):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _never_on_one(rank):
    if rank == 1:
        time.sleep(60)


def _unpicklable(rank):
    return lambda: rank


@pytest.mark.parametrize(
    ("fn", "message", "timeout"),
    [
        (_fail_on_one, "rank 1 failed:(.|\n)*rank one is unhappy", 60),
        (_die_on_one, "rank 1 failed:\nit died without an answer", 60),
        (_never_on_one, r"no answer from ranks \[1\] within 4 s", 4),
        (_unpicklable, "(?i)pickle", 60),
    ],
)
def test_the_first_cause_surfaces_at_once_and_no_process_is_left(fn, message, timeout):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, fn, timeout=timeout)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()
