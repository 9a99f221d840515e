"""Where in the ranks' programs the sends and receives go.

NCCL matches messages between two ranks by their order alone, and a rank that posts one may stand
still until the other end posts it too. So the two ends must agree on the order, on what is posted
together, and no circle of ranks may wait for one another. All of that follows if every exchange has
a *moment*, the same on both ends, and each rank posts its exchanges in the order of moments: of the
exchanges that are left, all ranks taking part in the earliest can get to it.

The moments come from a simulation with round costs. A message may be exchanged anywhere between the
end of the step that makes it and the start of the step that needs it; its moment is the last one in
between at which neither of its ranks is inside a step. Late, so that a posted receive does not hold
up what comes behind it, should the real costs differ; between steps, so that neither rank holds up
the other. Simulated with other costs (overlap perfect or none, messages of 3 % of a forward, noise
of 30 %), a rank that waits for a message where it needs it stays within 1.1 % of the schedule's time,
and one that stands still in every exchange within 3.4 %; if messages were exchanged as soon as they
are made, the latter would lose up to 30 %.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

from lightning_dualpipe.schedules.action import Action, Kind, Schedule
from lightning_dualpipe.schedules.check import check
from lightning_dualpipe.schedules.check_lowered import check_lowered
from lightning_dualpipe.schedules.program import Compute, Exchange, Instruction, Message, Program
from lightning_dualpipe.schedules.simulate import Costs, Span, Timeline, simulate

__all__ = ["lower"]

# Whole numbers, so that moments that should be equal are. An input gradient takes longer than a forward, and a
# forward longer than a weight gradient, as they do in a model; a pair saves something.
_ROUND_COSTS = Costs(forward=2, backward_input=3, backward_weight=1, overlapped=5)


@lru_cache(maxsize=32)
def lower(schedule: Schedule) -> tuple[Program, ...]:
    """The programs of all ranks, checked. Raises ScheduleError or DeadlockError if the schedule is not sound."""
    check(schedule)
    timeline = simulate(schedule, _ROUND_COSTS)
    posted: list[defaultdict[float, list[Message]]] = [defaultdict(list) for _ in range(schedule.num_ranks)]
    for message, moment in _messages(schedule, timeline):
        posted[message.source_rank][moment].append(message)
        posted[message.target_rank][moment].append(message)
    programs = tuple(
        Program(rank, tuple(_merge(rank, spans, posted[rank]))) for rank, spans in enumerate(timeline.spans)
    )
    check_lowered(schedule, programs)
    return programs


def _messages(schedule: Schedule, timeline: Timeline) -> Iterator[tuple[Message, float]]:
    """Every message with its moment, found where it is consumed."""
    made = {action.output: span.end for spans in timeline.spans for span in spans for action in span.step}
    starts = [[span.start for span in spans] for spans in timeline.spans]

    def moment(message: Message, needed: float) -> float:
        """The last time before ``needed`` when neither rank is inside a step; ``needed`` if there is none."""
        candidate = needed
        while candidate >= made[message.output]:
            free = min(
                _last_free(timeline.spans[rank], starts[rank], candidate)
                for rank in (message.source_rank, message.target_rank)
            )
            if free == candidate:
                return candidate
            candidate = free
        return needed

    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            for action in span.step:
                for output in action.inputs(schedule.num_stages):
                    source = schedule.rank_of(output.stage, output.microbatch)
                    if source != rank:
                        message = _message(schedule, output, action.stage, source, rank)
                        yield message, moment(message, span.start)


def _message(schedule: Schedule, output: Action, target_stage: int, source_rank: int, target_rank: int) -> Message:
    stage, kind, microbatch = output.stage, output.kind, output.microbatch
    tag = 2 * (stage * schedule.num_microbatches + microbatch) + (kind is Kind.BACKWARD)
    return Message(kind, stage, target_stage, microbatch, source_rank, target_rank, tag)


def _last_free(spans: Sequence[Span], starts: Sequence[float], time: float) -> float:
    """The last moment, no later than ``time``, at which the rank is not inside a step."""
    index = bisect_right(starts, time) - 1
    inside = index >= 0 and spans[index].start < time < spans[index].end
    return spans[index].start if inside else time


def _merge(rank: int, spans: Sequence[Span], posted: dict[float, list[Message]]) -> Iterator[Instruction]:
    """An exchange comes before the first step that starts at its moment or later."""
    moments = sorted(posted, reverse=True)
    for span in spans:
        while moments and moments[-1] <= span.start:
            yield _exchange(rank, posted[moments.pop()])
        yield Compute(span.step)
    while moments:
        yield _exchange(rank, posted[moments.pop()])


def _exchange(rank: int, messages: list[Message]) -> Exchange:
    in_order = sorted(messages, key=lambda message: message.tag)  # any order will do that both ends know
    return Exchange(
        sends=tuple(message for message in in_order if message.source_rank == rank),
        receives=tuple(message for message in in_order if message.target_rank == rank),
    )
