import pickle
from copy import deepcopy

import pytest

from lightning_dualpipe.errors import ScheduleError
from lightning_dualpipe.schedules import SCHEDULES, Action, Kind, Placement, Schedule, build_schedule, check
from lightning_dualpipe.schedules.action import format_step, parse_step


@pytest.mark.parametrize("kind", Kind)
def test_an_action_is_read_back_from_its_text(kind):
    action = Action(13, kind, 207)
    assert str(action) == f"13{kind.value}207"
    assert Action.parse(str(action)) == action


def test_a_pair_prints_with_a_plus():
    pair = (Action(0, Kind.FORWARD, 3), Action(3, Kind.BACKWARD, 5))
    assert format_step(pair) == "0F3+3B5"
    assert parse_step("0F3+3B5") == pair


@pytest.mark.parametrize("text", ["", "F7", "3F", "3X7", "3f7", "-1F7", "3F7 ", "3F7+"])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ScheduleError, match="no action; an action is stage, F, B, I or W, and microbatch, as in 3F7"):
        parse_step(text)


def test_inputs_are_the_neighbours_outputs():
    def inputs(text):
        return [str(action) for action in Action.parse(text).inputs(num_stages=4)]

    assert inputs("0F7") == []
    assert inputs("2F7") == ["1F7"]
    assert inputs("2B7") == inputs("2I7") == ["2F7", "3B7"]
    assert inputs("3B7") == ["3F7"]
    assert inputs("2W7") == ["2B7"]


def test_the_input_gradient_has_one_name_whoever_made_it():
    outputs = [Action.parse(text).output for text in ("2F7", "2B7", "2I7", "2W7")]
    assert [str(output) for output in outputs] == ["2F7", "2B7", "2B7", "None"]


@pytest.mark.parametrize(
    ("placement", "stages", "replicas"),
    [
        (Placement.line(3), [(0,), (1,), (2,)], [(0,), (1,), (2,)]),
        (Placement.v(2), [(0, 3), (1, 2)], [(0,), (1,), (1,), (0,)]),
        (Placement.v(1), [(0, 1)], [(0,), (0,)]),
        (Placement.bidirectional(2), [(0, 1), (0, 1)], [(0, 1), (0, 1)]),
        (Placement.bidirectional(4), [(0, 3), (1, 2), (1, 2), (0, 3)], [(0, 3), (1, 2), (1, 2), (0, 3)]),
    ],
)
def test_stages_and_replicas_by_hand(placement, stages, replicas):
    assert [placement.stages_on(rank) for rank in range(placement.num_ranks)] == stages
    assert [placement.replicas_of(stage) for stage in range(placement.num_stages)] == replicas


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ranks_of_a_dualpipe_and_of_a_v_have_two_stages_that_mirror_each_other(count):
    assert not Placement.line(count).is_mirrored
    assert Placement.v(count).is_mirrored
    assert Placement.bidirectional(2 * count).is_mirrored


def test_stages_of_a_rank_do_not_depend_on_the_microbatches():
    """One microbatch flows right only, but the ranks hold the stages of both directions."""
    schedule = build_schedule("dualpipe", 4, 1)
    assert [schedule.stages_on(rank) for rank in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]


@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 8, 9])
def test_the_first_half_of_the_microbatches_flows_right(num_microbatches):
    schedule = build_schedule("dualpipe", 4, num_microbatches)
    num_right = -(-num_microbatches // 2)
    for microbatch in range(num_microbatches):
        route = [schedule.rank_of(stage, microbatch) for stage in range(4)]
        assert route == ([0, 1, 2, 3] if microbatch < num_right else [3, 2, 1, 0])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 1), (4, 8), (6, 11)])
def test_a_schedule_is_read_back_from_its_text(name, num_ranks, num_microbatches):
    schedule = build_schedule(name, num_ranks, num_microbatches)
    assert Schedule.parse(str(schedule)) == schedule
    forwards = schedule.forward_only()
    assert Schedule.parse(str(forwards)) == forwards


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_value(name):
    """It can be sent to another process, copied, compared and looked up."""
    schedule = build_schedule(name, 4, 6)
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule == deepcopy(schedule) == build_schedule(name, 4, 6)
    assert hash(again) == hash(schedule)
    assert schedule != build_schedule(name, 4, 7)
    assert again.rank_of(1, 5) == schedule.rank_of(1, 5)


GOOD = "schedule mine of 1 microbatches\nroute 0\nrank 0: 0F0 0B0\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD.replace("schedule", "timetable"),
        GOOD.replace("route 0\n", ""),
        GOOD.replace("rank 0", "rank 1"),
        GOOD.replace("1 microbatches", "some microbatches"),
        GOOD + "rank 0: 0F0\n",
        GOOD + "and so on\n",
        GOOD + GOOD,
    ],
)
def test_text_of_another_form_is_refused(text):
    with pytest.raises(ScheduleError, match="a schedule is a line"):
        Schedule.parse(text)


def test_text_may_have_empty_lines_and_empty_programs():
    schedule = Schedule.parse("\n" + GOOD.replace("route 0", "route 0\n") + "\n")
    check(schedule)
    assert Schedule.parse(GOOD.replace(" 0F0 0B0", "")).steps == ((),)


def test_forwards_alone_keep_their_order():
    schedule = build_schedule("dualpipe", 4, 8)
    forwards = schedule.forward_only()
    check(forwards)
    assert not forwards.has_backward
    for mine, whole in zip(forwards.steps, schedule.steps, strict=True):
        assert [action for step in mine for action in step] == [
            action for step in whole for action in step if action.kind is Kind.FORWARD
        ]
        assert all(len(step) == 1 for step in mine)
