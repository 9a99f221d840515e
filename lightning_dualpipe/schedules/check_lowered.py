"""Whether programs with messages do what their schedule says, and come to an end.

Written against the programs alone, however they were made: the steps are the schedule's; every
output that another rank consumes travels exactly once, after the step that makes it and before the
step that needs it; between two ranks, both have the same messages in the same order (NCCL matches by
nothing else) and in the same groups; and if every exchange blocks until the other ends of all its
messages have been posted too, each rank still reaches its end.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from lightning_dualpipe.errors import DeadlockError, ScheduleError
from lightning_dualpipe.schedules.action import Action, Kind, Schedule
from lightning_dualpipe.schedules.program import Compute, Exchange, Message, Program

__all__ = ["check_lowered"]


def check_lowered(schedule: Schedule, programs: Sequence[Program]) -> None:
    """Raise ScheduleError on the first broken rule, DeadlockError naming who waits for whom."""
    _check_steps(schedule, programs)
    for find in (_wrong_messages, _wrong_places, _wrong_orders):
        for problem in find(schedule, programs):
            raise ScheduleError(f"lowered schedule {schedule.name}: {problem}")
    _check_end(schedule, programs)


def _check_steps(schedule: Schedule, programs: Sequence[Program]) -> None:
    computed = [tuple(i.step for i in program.instructions if isinstance(i, Compute)) for program in programs]
    if [program.rank for program in programs] != list(range(schedule.num_ranks)) or computed != list(schedule.steps):
        raise ScheduleError(f"lowered schedule {schedule.name}: the steps of its ranks are not those of the schedule")


def _exchanges(program: Program) -> Iterator[tuple[int, Exchange]]:
    return ((i, instr) for i, instr in enumerate(program.instructions) if isinstance(instr, Exchange))


def _wrong_messages(schedule: Schedule, programs: Sequence[Program]) -> Iterator[str]:
    """Messages missing, doubled, not asked for, or on the wrong rank."""
    sent = [(program.rank, message) for program in programs for _, e in _exchanges(program) for message in e.sends]
    received = [
        (program.rank, message) for program in programs for _, e in _exchanges(program) for message in e.receives
    ]
    wanted = dict(_wanted(schedule))
    for verb, posted in (("sends", sent), ("receives", received)):
        seen: set[Action] = set()
        for rank, message in posted:
            route = (message.target_stage, message.source_rank, message.target_rank)
            own = message.source_rank if verb == "sends" else message.target_rank
            if wanted.get(message.output) != route or rank != own:
                yield f"rank {rank} {verb} {message}, which nobody asked for"
            if message.output in seen:
                yield f"rank {rank} {verb} {message} twice"
            seen.add(message.output)
        for output in wanted.keys() - seen:
            _, source, target = wanted[output]
            rank = source if verb == "sends" else target
            yield f"rank {rank} never {verb} {output} from rank {source} to rank {target}"
    if len({message.tag for _, message in sent}) != len(sent) or {m for _, m in sent} != {m for _, m in received}:
        yield "the two ends of a message disagree about its tag, or two messages share one"


def _wanted(schedule: Schedule) -> Iterator[tuple[Action, tuple[int, int, int]]]:
    """Outputs that leave their rank, each with target stage, source rank and target rank."""
    for source, steps in enumerate(schedule.steps):
        for output in (action.output for step in steps for action in step):
            if output is not None:
                target_stage = output.stage + (1 if output.kind is Kind.FORWARD else -1)
                if 0 <= target_stage < schedule.num_stages:
                    target = schedule.rank_of(target_stage, output.microbatch)
                    if target != source:
                        yield output, (target_stage, source, target)


def _wrong_places(schedule: Schedule, programs: Sequence[Program]) -> Iterator[str]:
    """Messages sent before they are made or received after they are needed."""
    for program in programs:
        rank = program.rank
        known: set[Action] = set()  # outputs this rank has, made here or received
        for position, instruction in enumerate(program.instructions):
            if isinstance(instruction, Exchange):
                for message in instruction.sends:
                    if message.output not in known:
                        yield f"rank {rank} sends {message.output} before it is made: {_excerpt(program, position)}"
                known.update(message.output for message in instruction.receives)
                continue
            for action in instruction.step:
                for output in action.inputs(schedule.num_stages):
                    if output not in known:
                        yield f"rank {rank} computes {action} before it has {output}: {_excerpt(program, position)}"
            known.update(action.output for action in instruction.step if action.output is not None)


def _wrong_orders(schedule: Schedule, programs: Sequence[Program]) -> Iterator[str]:
    """Pairs of ranks that disagree about the order of their messages, or about which go together."""
    sends: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    receives: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    place: dict[tuple[int, int], int] = {}  # rank and tag of message -> which of its instructions
    for program in programs:
        for index, exchange in _exchanges(program):
            for message in exchange.messages:
                place[program.rank, message.tag] = index
                channel = (message.source_rank, message.target_rank)
                (sends if message.source_rank == program.rank else receives)[channel].append(message)
    for (source, target), messages in sends.items():
        for sent, received in zip(messages, receives[source, target], strict=True):
            if sent != received:
                yield f"rank {source} sends {sent.output} when rank {target} receives {received.output}"
    for program in programs:
        for _, exchange in _exchanges(program):
            partners: dict[int, tuple[int, Message]] = {}  # other rank -> where its end is, and of which message
            for message in exchange.messages:
                other = _other_end(message, program.rank)
                theirs = place[other, message.tag]
                first, of = partners.setdefault(other, (theirs, message))
                if first != theirs:
                    yield f"rank {program.rank} posts {of.output} and {message.output} together, rank {other} does not"


def _check_end(schedule: Schedule, programs: Sequence[Program]) -> None:
    """Follow all programs at once, every exchange blocking until the other end of each message is posted."""
    todo = [deque(exchange for _, exchange in _exchanges(program)) for program in programs]
    posted: set[tuple[int, int]] = set()  # rank and tag of message

    def absent(rank: int) -> list[int]:
        """Ranks that have not yet posted their end of the exchange this rank is in."""
        others = ((_other_end(message, rank), message.tag) for message in todo[rank][0].messages)
        return sorted({other for other, tag in others if (other, tag) not in posted})

    awake = deque(range(len(programs)))
    while awake:
        rank = awake.popleft()
        while todo[rank]:
            for message in todo[rank][0].messages:
                if (rank, message.tag) not in posted:
                    posted.add((rank, message.tag))
                    awake.append(_other_end(message, rank))
            if absent(rank):
                break
            todo[rank].popleft()
    if any(todo):
        waits = (
            f"  rank {rank} in {left[0]} waits for " + ", ".join(f"rank {other}" for other in absent(rank))
            for rank, left in enumerate(todo)
            if left
        )
        raise DeadlockError(f"lowered schedule {schedule.name} stops before its end:\n" + "\n".join(waits))


def _other_end(message: Message, rank: int) -> int:
    return message.target_rank if rank == message.source_rank else message.source_rank


def _excerpt(program: Program, position: int, *, around: int = 3) -> str:
    instructions = [f">{i}<" if index == position else str(i) for index, i in enumerate(program.instructions)]
    first, last = max(0, position - around), position + around + 1
    before, after = "… " if first else "", " …" if last < len(instructions) else ""
    return f"{before}{' '.join(instructions[first:last])}{after}"
