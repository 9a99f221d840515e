"""The helper of the tests is tested too: a test that cannot fail shows nothing."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Cases, run_ranks


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


def _in_turn(rank, what):
    if what == "fail" and rank == 1:
        raise ValueError("rank one is unhappy")
    if what == "die" and rank == 1:
        os._exit(7)
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    return int(total), os.getpid()


def test_cases_share_their_processes_and_one_that_fails_takes_no_other_with_it():
    cases = Cases(2, _in_turn, {what: (what,) for what in ("first", "second", "fail", "third", "die", "last")})
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*rank one is unhappy"):
        cases["fail"]
    with pytest.raises(AssertionError, match="rank 1 failed:\nit died without an answer"):
        cases["die"]
    found = {what: [total for total, _ in cases[what]] for what in ("first", "second", "third", "last")}
    assert all(totals == [3, 3] for totals in found.values())
    processes = {what: [process for _, process in cases[what]] for what in found}
    assert processes["first"] == processes["second"] != processes["third"] != processes["last"]
    assert not multiprocessing.active_children()
