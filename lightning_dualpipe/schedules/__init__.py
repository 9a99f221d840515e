"""Pipeline schedules as values: who computes what, in which order; nothing of tensors or processes.

    schedule = build_schedule("dualpipe", num_ranks=4, num_microbatches=8)
    print(schedule)                                  # every rank's steps, as text
    print(draw_text(schedule))                       # the same over time
    simulate(schedule, Costs(overlapped=2)).idle     # the bubble of every rank
    lower(schedule)                                  # with sends and receives, free of deadlock

Standard library only, but for ``draw_picture``, which needs matplotlib when it is called.
"""

from lightning_dualpipe.schedules.action import Action, Kind, Placement, Schedule, Step, format_step
from lightning_dualpipe.schedules.build import SCHEDULES, build_schedule
from lightning_dualpipe.schedules.check import check
from lightning_dualpipe.schedules.check_lowered import check_lowered
from lightning_dualpipe.schedules.draw import draw_picture, draw_text
from lightning_dualpipe.schedules.exchange import lower
from lightning_dualpipe.schedules.program import Compute, Exchange, Instruction, Message, Program, format_programs
from lightning_dualpipe.schedules.simulate import Costs, Span, Timeline, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "Compute",
    "Costs",
    "Exchange",
    "Instruction",
    "Kind",
    "Message",
    "Placement",
    "Program",
    "Schedule",
    "Span",
    "Step",
    "Timeline",
    "build_schedule",
    "check",
    "check_lowered",
    "draw_picture",
    "draw_text",
    "format_programs",
    "format_step",
    "lower",
    "simulate",
]
