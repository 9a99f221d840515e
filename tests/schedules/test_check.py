"""Broken schedules are refused, and the message shows where."""

import random
from dataclasses import replace

import pytest

from lightning_dualpipe.errors import DeadlockError, ScheduleError
from lightning_dualpipe.schedules import SCHEDULES, Action, Schedule, build_schedule, check


def with_steps(schedule, rank, change):
    steps = [list(program) for program in schedule.steps]
    change(steps[rank])
    return replace(schedule, steps=tuple(map(tuple, steps)))


ONE_RANK = "schedule mine of 2 microbatches\nroute 0\nrank 0: {}\n"


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("0F0 0B0 0F1", "rank 0: 0B1, or its I and W is missing"),
        ("0F0 0B0", "rank 0: 0F1 is missing"),
        ("0F0 0B0 0F1 0I1", "rank 0: 0B1, or its I and W is missing"),
        ("0F0 0F0 0B0 0F1 0B1", "rank 0, 0F0: it was computed before"),
        ("0F0 0B0 0B1 0F1", "rank 0, 0B1: 0F1 has to come first"),
        ("0F0 0I0 0F1+0B1 0W0", "rank 0, 0B1: 0F1 has to come first"),
        ("0F0 0B0 0F1 0B1 0I1", "rank 0, 0I1: 0B1 has done that before"),
        ("0F0 0I0 0B0 0W0 0F1 0B1", "rank 0, 0B0: 0I0 has done that before"),
        ("0F0 0W0 0I0 0F1 0B1", "rank 0, 0W0: 0I0 has to come first"),
        ("0F0 0B0 0F1 0B1 0W1", "rank 0, 0W1: 0I1 has to come first"),
        ("0F0 0I0 0W0 0W0 0F1 0B1", "rank 0, 0W0: it was computed before"),
        ("0F0 0F1 0I0 0I1 0W1 0W0", "rank 0, 0W1: weight gradients of stage 0 have to come in the order"),
        ("0F0 0B0 1F1 0B1", "rank 0, 1F1: there are 1 stages and 2 microbatches, counted from 0"),
        ("0F0 0B0 0F2 0B1", "rank 0, 0F2: there are 1 stages and 2 microbatches, counted from 0"),
        ("0F0 0F1+0I0 0W0 0B1", "rank 0: a step is one action, or a forward and a full backward"),
        ("0F0 0B0+0F1 0B1", "rank 0: a step is one action, or a forward and a full backward"),
        ("0F0 0F1 0F1+0B0+0B1", "rank 0: a step is one action, or a forward and a full backward"),
    ],
)
def test_each_rule_has_its_message(steps, problem):
    with pytest.raises(ScheduleError) as caught:
        check(Schedule.parse(ONE_RANK.format(steps)))
    assert f"schedule mine, {problem}" in str(caught.value)


def test_the_message_shows_the_grid_and_marks_the_cell():
    def move_first_backward_to_the_front(steps):
        steps.insert(0, steps.pop(6))

    with pytest.raises(ScheduleError) as caught:
        check(with_steps(build_schedule("dualpipe", 4, 8), 1, move_first_backward_to_the_front))
    assert str(caught.value) == (
        "schedule dualpipe, rank 1, 1B0: 1F0 has to come first:\n"
        "  rank 0: 0F0 0F1 0F2 3F4 3I4 …\n"
        "  rank 1: >2F6+1B0< 1F0 2F4 1F1 2F5 …\n"
        "  rank 2: 1F4 2F0 1F5 2F1 1F6 …\n"
        "  rank 3: 0F4 0F5 0F6 3F0 3I0 …"
    )


def test_an_action_on_the_wrong_rank_is_refused():
    text = "schedule mine of 2 microbatches\nroute 0 1\nroute 1 0\nrank 0: 0F0 1F1 1B1 0B0\nrank 1: 0F1 1F0 1B0 0B1\n"
    check(Schedule.parse(text))
    swapped = text.replace("0F0", "0Fx").replace("0F1", "0F0").replace("0Fx", "0F1")
    with pytest.raises(ScheduleError, match="rank 0, 0F1: its place is rank 1"):
        check(Schedule.parse(swapped))


@pytest.mark.parametrize(
    "head",
    [
        "schedule mine of 0 microbatches\nroute 0 1",
        "schedule mine of 1 microbatches\nroute 0 2",
        "schedule mine of 1 microbatches\nroute 0 1\nroute 0",
        "schedule mine of 1 microbatches\nroute 0",
        "schedule mine of 1 microbatches\nroute 0 1 2",
    ],
)
def test_sizes_have_to_fit(head):
    with pytest.raises(ScheduleError, match=r"schedule mine has \d"):
        check(Schedule.parse(f"{head}\nrank 0: 0F0 0B0\nrank 1: 1F0 1B0\n"))


def test_programs_that_wait_for_each_other_are_refused():
    """Every rank by itself keeps the rules; together they stop: 1F1 is too early."""
    text = "schedule mine of 2 microbatches\nroute 0 1\nrank 0: 0F0 0B0 0F1 0B1\nrank 1: 1F1 1F0 1B0 1B1\n"
    with pytest.raises(DeadlockError) as caught:
        check(Schedule.parse(text))
    assert "rank 0 cannot run 0B0: waits for 1B0 of rank 1" in str(caught.value)
    assert "rank 1 cannot run 1F1: waits for 0F1 of rank 0" in str(caught.value)


def dropped(steps, index):
    del steps[index]


def doubled(steps, index):
    steps.insert(index, steps[index])


def renumbered(steps, index):
    """Another microbatch."""
    first, *rest = steps[index]
    steps[index] = (replace(first, microbatch=first.microbatch + 1), *rest)


def moved_to_another_stage(steps, index):
    first, *rest = steps[index]
    steps[index] = (replace(first, stage=first.stage + 1), *rest)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mutate", [dropped, doubled, renumbered, moved_to_another_stage])
@pytest.mark.parametrize("seed", range(5))
def test_no_damage_goes_unnoticed(name, mutate, seed):
    draw = random.Random(seed)
    schedule = build_schedule(name, 4, draw.randint(3, 12))
    rank = draw.randrange(4)
    index = draw.randrange(len(schedule.steps[rank]))
    with pytest.raises(ScheduleError):
        check(with_steps(schedule, rank, lambda steps: mutate(steps, index)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_backward_before_its_forward_goes_never_unnoticed(name):
    schedule = build_schedule(name, 4, 6)
    for rank, steps in enumerate(schedule.steps):
        for index, step in enumerate(steps):
            for action in step:
                if action.kind.value in "BI":
                    forward = steps.index(next(s for s in steps if Action(action.stage, "F", action.microbatch) in s))

                    def swap(program, i=index, j=forward):
                        program[i], program[j] = program[j], program[i]

                    with pytest.raises(ScheduleError):
                        check(with_steps(schedule, rank, swap))
