"""Programs with messages: sound as built, refused when damaged, and not slower than the schedule."""

import pickle
import random
from dataclasses import replace

import pytest

from lightning_dualpipe.errors import DeadlockError, ScheduleError
from lightning_dualpipe.schedules import (
    SCHEDULES,
    Compute,
    Costs,
    Exchange,
    Kind,
    Program,
    Schedule,
    build_schedule,
    check_lowered,
    format_programs,
    lower,
    simulate,
)

TWO_RANKS = Schedule.parse(
    "schedule mine of 2 microbatches\nroute 0 1\nrank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1B0 1F1 1B1\n"
)


def test_a_lowered_pipeline_by_hand():
    assert format_programs(lower(TWO_RANKS)) == (
        "rank 0: 0F0 {0F0>1} 0F1 {0F1>1 1B0<1} 0B0 {1B1<1} 0B1\n"  # 0F1 leaves when rank 1 has time for it
        "rank 1: {0F0<0} 1F0 1B0 {1B0>0 0F1<0} 1F1 1B1 {1B1>0}\n"
    )


def test_a_message_says_where_it_goes():
    programs = lower(build_schedule("dualpipe", 4, 8))
    messages = [message for _, exchange in exchanges(programs[1]) for message in exchange.messages]
    by_output = {str(message.output): message for message in messages}
    forward, backward = by_output["1F2"], by_output["2B4"]
    assert str(forward) == "1F2 from rank 1 to rank 2"
    assert (forward.kind, forward.source_stage, forward.target_stage, forward.microbatch) == (Kind.FORWARD, 1, 2, 2)
    assert str(backward) == "2B4 from rank 1 to rank 2"
    assert (backward.kind, backward.source_stage, backward.target_stage) == (Kind.BACKWARD, 2, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tags_are_unique_and_small(name):
    schedule = build_schedule(name, 4, 9)
    programs = lower(schedule)
    tags = [message.tag for program in programs for _, exchange in exchanges(program) for message in exchange.sends]
    assert len(set(tags)) == len(tags)
    assert set(tags) <= set(range(2 * schedule.num_stages * 9))


def test_programs_are_values():
    programs = lower(build_schedule("dualpipe", 4, 8))
    assert pickle.loads(pickle.dumps(programs)) == programs
    assert lower(build_schedule("dualpipe", 4, 8)) is programs, "the same schedule is lowered once"


def test_in_the_steady_state_neighbours_swap_all_they_have_at_once():
    """One batch between two pairs: an activation and a gradient each way, all with the same rank."""
    instructions = lower(build_schedule("dualpipe", 4, 32))[1].instructions
    steady = [
        between
        for before, between, after in zip(instructions, instructions[1:], instructions[2:], strict=False)
        if isinstance(before, Compute) and isinstance(after, Compute) and len(before.step) == len(after.step) == 2
    ]
    assert len(steady) == 26
    for exchange in steady:
        assert [message.kind for message in exchange.sends] in (
            [Kind.FORWARD, Kind.BACKWARD],
            [Kind.BACKWARD, Kind.FORWARD],
        )
        assert len(exchange.receives) == 2
        assert len({message.target_rank for message in exchange.sends}) == 1
        assert {m.source_rank for m in exchange.receives} == {m.target_rank for m in exchange.sends}


def exchanges(program):
    return [(i, instruction) for i, instruction in enumerate(program.instructions) if isinstance(instruction, Exchange)]


def time_with_exchanges(schedule, programs, costs, *, blocking):
    """A second, plain simulator, of programs: every rank does one instruction after the other.

    A send leaves when its rank gets to it. ``blocking``: a rank stands still in an exchange until
    the other end of each of its messages is there; else it waits for a message where it needs it.
    """
    clock = [0.0] * len(programs)
    todo = [list(program.instructions) for program in programs]
    posted = {}  # (rank, tag) -> when
    there = {}  # output -> when it is on the rank that needs it
    while any(todo):
        before = list(map(len, todo))
        for rank, instructions in enumerate(todo):
            while instructions:
                now = clock[rank]
                match instructions[0]:
                    case Compute(step):
                        needed = [output for action in step for output in action.inputs(schedule.num_stages)]
                        foreign = [o for o in needed if schedule.rank_of(o.stage, o.microbatch) != rank]
                        if any(output not in there for output in foreign):
                            break
                        clock[rank] = max(now, *(there[output] for output in foreign), 0) + costs.of(step)
                    case Exchange(sends, receives) as exchange:
                        for message in exchange.messages:
                            posted.setdefault((rank, message.tag), now)
                        others = [(m.source_rank + m.target_rank - rank, m.tag) for m in exchange.messages]
                        if blocking and any(other not in posted for other in others):
                            break
                        if blocking:
                            clock[rank] = max(now, *(posted[other] for other in others)) + costs.send
                        for message in receives if blocking else sends:
                            there[message.output] = clock[rank] + (0 if blocking else costs.send)
                instructions.pop(0)
        assert before != list(map(len, todo)), "nobody gets any further"
    return max(clock)


UNEQUAL = [Costs(overlapped=2), Costs(97, 112, 30, 128), Costs(48, 60, 20, 90), Costs(1.2, 0.8, 1, 2.2)]
LAYOUTS = [("dualpipe", 4, 8), ("dualpipe", 4, 5), ("dualpipe", 8, 20), ("dualpipev", 4, 10), ("dualpipev", 3, 4)]
LAYOUTS += [("zb1p", 6, 14), ("1f1b", 4, 9), ("gpipe", 4, 5)]


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), LAYOUTS)
@pytest.mark.parametrize("blocking", [False, True])
def test_exchanges_cost_nothing_where_costs_are_round(name, num_ranks, num_microbatches, blocking):
    schedule = build_schedule(name, num_ranks, num_microbatches)
    for costs in (Costs(), Costs(overlapped=2)):
        ideal = simulate(schedule, costs).duration
        assert time_with_exchanges(schedule, lower(schedule), costs, blocking=blocking) == ideal


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), LAYOUTS)
@pytest.mark.parametrize("costs", UNEQUAL, ids=str)
@pytest.mark.parametrize(("blocking", "allowed"), [(False, 1.002), (True, 1.05)])
def test_exchanges_cost_little_whatever_the_costs(name, num_ranks, num_microbatches, costs, blocking, allowed):
    """The order of exchanges is settled before anybody knows the real costs."""
    schedule = build_schedule(name, num_ranks, num_microbatches)
    ideal = simulate(schedule, costs).duration
    assert time_with_exchanges(schedule, lower(schedule), costs, blocking=blocking) <= ideal * allowed


def with_instructions(programs, rank, change):
    instructions = list(programs[rank].instructions)
    change(instructions)
    changed = list(programs)
    changed[rank] = Program(rank, tuple(instructions))
    return tuple(changed)


def refused(schedule, programs, *messages, error=ScheduleError):
    with pytest.raises(error) as caught:
        check_lowered(schedule, programs)
    for message in messages:
        assert message in str(caught.value)


def rank_0(*order):
    """TWO_RANKS with the instructions of rank 0 in another order."""
    old = lower(TWO_RANKS)[0].instructions
    return (Program(0, tuple(old[index] for index in order)), lower(TWO_RANKS)[1])


def test_the_order_by_hand_is_the_one_that_passes():
    assert rank_0(*range(7)) == lower(TWO_RANKS)
    check_lowered(TWO_RANKS, rank_0(*range(7)))


def test_sending_before_computing_is_refused():
    refused(TWO_RANKS, rank_0(1, 0, *range(2, 7)), "rank 0 sends 0F0 before it is made: >{0F0>1}< 0F0 0F1 {0F1>1")


def test_receiving_after_it_is_needed_is_refused():
    refused(TWO_RANKS, rank_0(0, 1, 2, 4, 3, 5, 6), "rank 0 computes 0B0 before it has 1B0")


def test_a_message_lost_on_either_end_is_refused():
    programs = lower(TWO_RANKS)
    refused(
        TWO_RANKS, with_instructions(programs, 0, lambda i: i.pop(1)), "rank 0 never sends 0F0 from rank 0 to rank 1"
    )
    refused(TWO_RANKS, with_instructions(programs, 1, lambda i: i.pop(0)), "rank 1 never receives 0F0")


def test_a_message_sent_or_received_twice_is_refused():
    programs = lower(TWO_RANKS)
    refused(TWO_RANKS, with_instructions(programs, 0, lambda i: i.insert(2, i[1])), "rank 0 sends 0F0", "twice")
    refused(TWO_RANKS, with_instructions(programs, 1, lambda i: i.insert(0, i[0])), "rank 1 receives 0F0", "twice")


def test_a_message_nobody_asked_for_is_refused():
    programs = lower(TWO_RANKS)
    message = programs[0].instructions[1].sends[0]
    astray = Exchange((replace(message, target_rank=2),), ())
    refused(TWO_RANKS, with_instructions(programs, 0, lambda i: i.insert(2, astray)), "which nobody asked for")
    back = Exchange((), (message,))
    refused(TWO_RANKS, with_instructions(programs, 0, lambda i: i.insert(2, back)), "which nobody asked for")


def test_a_tag_that_differs_between_the_ends_is_refused():
    programs = lower(TWO_RANKS)
    message = programs[0].instructions[1].sends[0]

    def retag(instructions):
        instructions[1] = Exchange((replace(message, tag=99),), ())

    refused(TWO_RANKS, with_instructions(programs, 0, retag), "the two ends of a message disagree about its tag")


def test_steps_that_are_not_the_schedules_are_refused():
    programs = lower(TWO_RANKS)
    refused(TWO_RANKS, with_instructions(programs, 0, lambda i: i.pop(0)), "are not those of the schedule")
    refused(TWO_RANKS, programs[::-1], "are not those of the schedule")
    refused(TWO_RANKS, programs[:1], "are not those of the schedule")


FORWARDS = Schedule.parse("schedule mine of 2 microbatches\nroute 0 1\nrank 0: 0F0 0F1\nrank 1: 1F0 1F1\n")


def test_messages_in_another_order_on_the_other_end_are_refused():
    """0F0 and 0F1, sent in this order; received the other way round, NCCL would swap their contents."""
    first, second = (exchange for _, exchange in exchanges(lower(FORWARDS)[0]))
    f0, f1 = (instruction for instruction in lower(FORWARDS)[0].instructions if isinstance(instruction, Compute))
    g0, g1 = (instruction for instruction in lower(FORWARDS)[1].instructions if isinstance(instruction, Compute))
    receive_0, receive_1 = Exchange((), first.sends), Exchange((), second.sends)
    sender = Program(0, (f0, first, f1, second))
    check_lowered(FORWARDS, (sender, Program(1, (receive_0, receive_1, g0, g1))))
    refused(
        FORWARDS,
        (sender, Program(1, (receive_1, receive_0, g0, g1))),
        "rank 0 sends 0F0 when rank 1 receives 0F1",
    )
    both = Exchange((), first.sends + second.sends)
    refused(FORWARDS, (sender, Program(1, (both, g0, g1))), "rank 1 posts 0F0 and 0F1 together, rank 0 does not")
    both_sent = Exchange(first.sends + second.sends, ())
    refused(
        FORWARDS,
        (Program(0, (f0, f1, both_sent)), Program(1, (receive_0, g0, receive_1, g1))),
        "rank 0 posts 0F0 and 0F1 together, rank 1 does not",
    )


def test_ranks_that_stand_still_for_each_other_are_refused():
    """Each end by itself is in order: rank 0 wants to send first, rank 1 too, and nobody receives."""
    schedule = Schedule.parse(
        "schedule mine of 2 microbatches\nroute 0 1\nroute 1 0\nrank 0: 0F0 1F1\nrank 1: 0F1 1F0\n"
    )
    (exchange,) = (exchange for _, exchange in exchanges(lower(schedule)[0]))  # both messages at once
    send_0, send_1 = exchange.sends, exchange.receives
    of_0 = [instruction for instruction in lower(schedule)[0].instructions if isinstance(instruction, Compute)]
    of_1 = [instruction for instruction in lower(schedule)[1].instructions if isinstance(instruction, Compute)]
    programs = (
        Program(0, (of_0[0], Exchange(send_0, ()), Exchange((), send_1), of_0[1])),
        Program(1, (of_1[0], Exchange(send_1, ()), Exchange((), send_0), of_1[1])),
    )
    refused(
        schedule,
        programs,
        "lowered schedule mine stops before its end",
        "rank 0 in {0F0>1} waits for rank 1",
        "rank 1 in {0F1>0} waits for rank 0",
        error=DeadlockError,
    )


def test_a_circle_of_three_ranks_is_found():
    """Between any two ranks all is in order."""
    routes = "\n".join(f"route {a} {b}" for a, b in ((0, 1), (1, 2), (2, 0)))
    schedule = Schedule.parse(
        f"schedule ring of 3 microbatches\n{routes}\nrank 0: 0F0 1F2\nrank 1: 0F1 1F0\nrank 2: 0F2 1F1\n"
    )
    check_lowered(schedule, lower(schedule))
    apart = []
    for program in lower(schedule):
        sends = tuple(message for _, exchange in exchanges(program) for message in exchange.sends)
        receives = tuple(message for _, exchange in exchanges(program) for message in exchange.receives)
        first, second = (instruction for instruction in program.instructions if isinstance(instruction, Compute))
        apart.append(Program(program.rank, (first, Exchange(sends, ()), Exchange((), receives), second)))
    refused(schedule, apart, "rank 0 in {0F0>1} waits for rank 1", "rank 2 in {0F2>0} waits", error=DeadlockError)


def moved_later(instructions, index):
    """Past the next step: a receive too late, or the order no longer the other end's, or a longer wait."""
    instructions.insert(min(index + 2, len(instructions) - 1), instructions.pop(index))


def swapped_with_next_exchange(instructions, index):
    following = next((i for i in range(index + 1, len(instructions)) if isinstance(instructions[i], Exchange)), index)
    instructions[index], instructions[following] = instructions[following], instructions[index]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(30))
def test_damage_is_noticed_or_does_no_harm(name, seed):
    """What the checks let pass must also run in the plain simulator, whose ranks block in every exchange."""
    draw = random.Random(seed)
    schedule = build_schedule(name, 4, draw.randint(2, 10))
    programs = lower(schedule)
    rank = draw.randrange(4)
    index = draw.choice([index for index, _ in exchanges(programs[rank])])
    change = draw.choice([moved_later, swapped_with_next_exchange])
    damaged = with_instructions(programs, rank, lambda instructions: change(instructions, index))
    try:
        check_lowered(schedule, damaged)
    except ScheduleError:
        return
    assert time_with_exchanges(schedule, damaged, Costs(), blocking=True) >= simulate(schedule).duration


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(10))
def test_a_message_dropped_or_doubled_is_always_noticed(name, seed):
    draw = random.Random(seed)
    schedule = build_schedule(name, 4, draw.randint(1, 10))
    programs = lower(schedule)
    rank = draw.choice([program.rank for program in programs if exchanges(program)])
    index, exchange = draw.choice(exchanges(programs[rank]))
    end = draw.choice([end for end in ("sends", "receives") if getattr(exchange, end)])
    messages = getattr(exchange, end)
    chosen = draw.randrange(len(messages))
    for left in (messages[:chosen] + messages[chosen + 1 :], messages + messages[chosen : chosen + 1]):
        damaged = list(programs[rank].instructions)
        damaged[index] = replace(exchange, **{end: left})
        refused(schedule, (*programs[:rank], Program(rank, tuple(damaged)), *programs[rank + 1 :]))


def test_an_unsound_schedule_is_not_lowered():
    waiting = str(TWO_RANKS).replace("0F0 0F1 0B0 0B1", "0F0 0B0 0F1 0B1").replace("1F0 1B0 1F1", "1F1 1F0 1B0")
    with pytest.raises(DeadlockError, match="schedule mine stops before its end"):
        lower(Schedule.parse(waiting))
