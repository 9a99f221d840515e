"""Whether a schedule keeps the rules.

    each action exists, once, on the rank that the placement names
    a backward comes after the forward of its own stage, a weight gradient after its input gradient
    weight gradients of a stage come in the order of its input gradients: they wait in queues
    a microbatch has on every stage one F, and either B, or I and W; or, without any backward, F alone
    a pair is a forward and a full backward that do not need each other
    following all programs at once, nobody waits for ever

An engine relies on these and checks none of them.
"""

from collections import defaultdict, deque
from collections.abc import Iterator

from lightning_dualpipe.errors import ScheduleError
from lightning_dualpipe.schedules.action import Action, Kind, Schedule, Step, format_step
from lightning_dualpipe.schedules.simulate import simulate

__all__ = ["check"]

_Problem = tuple[int, int, str]  # rank, which of its steps, what is wrong there


def check(schedule: Schedule) -> None:
    """Raise ScheduleError on the first broken rule, with the steps around it; DeadlockError if it would stop."""
    _check_size(schedule)
    for find in (_broken_steps, _missing_actions):
        for rank, index, problem in find(schedule):
            raise ScheduleError(f"schedule {schedule.name}, {problem}:\n{_grid(schedule, rank, index)}")
    simulate(schedule)


def _check_size(schedule: Schedule) -> None:
    routes = schedule.placement.routes
    ranks = {rank for route in routes for rank in route}
    if schedule.num_microbatches < 1 or len({len(route) for route in routes}) != 1 or ranks != set(range(len(ranks))):
        raise ScheduleError(
            f"schedule {schedule.name} has {schedule.num_microbatches} microbatches and routes {routes}; "
            "it needs at least one microbatch, and routes of one length over ranks 0, 1, 2, …"
        )
    if len(schedule.steps) != schedule.num_ranks:
        raise ScheduleError(
            f"schedule {schedule.name} has {len(schedule.steps)} programs, and routes over {schedule.num_ranks} ranks"
        )


def _broken_steps(schedule: Schedule) -> Iterator[_Problem]:
    for rank, steps in enumerate(schedule.steps):
        done: set[Action] = set()
        split: defaultdict[int, deque[int]] = defaultdict(deque)  # stage -> microbatches whose W is due, in order
        for index, step in enumerate(steps):
            if not _is_step(step):
                yield rank, index, f"rank {rank}: a step is one action, or a forward and a full backward"
            for action in step:
                for problem in _broken_rules(schedule, rank, action, done, split[action.stage]):
                    yield rank, index, f"rank {rank}, {action}: {problem}"
            for action in step:  # only now: the two of a pair run at the same time
                done.add(action)
                if action.kind is Kind.BACKWARD_INPUT:
                    split[action.stage].append(action.microbatch)


def _is_step(step: Step) -> bool:
    kinds = tuple(action.kind for action in step)
    return len(kinds) == 1 or kinds == (Kind.FORWARD, Kind.BACKWARD)


def _broken_rules(schedule: Schedule, rank: int, action: Action, done: set[Action], due: deque[int]) -> Iterator[str]:
    """Rules an action breaks after ``done``. ``due`` are the microbatches whose W its stage owes; a W takes its own."""
    stage, kind, microbatch = action.stage, action.kind, action.microbatch
    if not (0 <= stage < schedule.num_stages and 0 <= microbatch < schedule.num_microbatches):
        yield f"there are {schedule.num_stages} stages and {schedule.num_microbatches} microbatches, counted from 0"
        return
    if (place := schedule.rank_of(stage, microbatch)) != rank:
        yield f"its place is rank {place}"
    if action in done:
        yield "it was computed before"
    if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
        if Action(stage, Kind.FORWARD, microbatch) not in done:
            yield f"{stage}F{microbatch} has to come first"
        other = Kind.BACKWARD_INPUT if kind is Kind.BACKWARD else Kind.BACKWARD
        if Action(stage, other, microbatch) in done:
            yield f"{stage}{other}{microbatch} has done that before"
    if kind is Kind.BACKWARD_WEIGHT:
        if not due:
            yield f"{stage}I{microbatch} has to come first"
        elif due.popleft() != microbatch:
            yield f"weight gradients of stage {stage} have to come in the order of its input gradients"


def _missing_actions(schedule: Schedule) -> Iterator[_Problem]:
    done = {action for steps in schedule.steps for step in steps for action in step}
    has_backward = schedule.has_backward
    for microbatch in range(schedule.num_microbatches):
        for stage in range(schedule.num_stages):
            forward, full, split, weight = (Action(stage, kind, microbatch) in done for kind in Kind)
            if forward and (full or (split and weight) or not has_backward):
                continue
            rank = schedule.rank_of(stage, microbatch)
            wanted = f"{stage}F{microbatch}" if not forward else f"{stage}B{microbatch}, or its I and W"
            yield rank, len(schedule.steps[rank]), f"rank {rank}: {wanted} is missing"


def _grid(schedule: Schedule, rank: int, index: int, *, around: int = 4) -> str:
    """The steps around one, which is marked; a program's end is a cell too."""
    lines = []
    for row in range(max(0, rank - around), min(schedule.num_ranks, rank + around + 1)):
        cells = [*map(format_step, schedule.steps[row]), ""]
        if row == rank:
            cells[index] = f">{cells[index]}<"
        first, last = max(0, index - around), index + around + 1
        before, after = "… " if first else "", " …" if last < len(cells) else ""
        lines.append(f"  rank {row}: {before}{' '.join(cells[first:last])}{after}")
    return "\n".join(lines)
