"""Colours of pictures of schedules."""

from lightning_dualpipe.schedules.action import Action, Kind, Schedule

__all__ = ["COLOURS", "FAINT", "IDLE", "INK", "NAMES", "shade"]

# Of each kind of work the shade of the first direction, and the paler one of the second.
COLOURS = {
    Kind.FORWARD: ("#f2b544", "#fbdd9a"),
    Kind.BACKWARD: ("#79b473", "#bfdeb5"),
    Kind.BACKWARD_INPUT: ("#5fb3bf", "#b5dee2"),
    Kind.BACKWARD_WEIGHT: ("#7699d4", "#bfd0ee"),
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward for input",
    Kind.BACKWARD_WEIGHT: "backward for weights",
}
INK, FAINT, IDLE = "#262626", "#85857f", "#f2f1ed"


def shade(schedule: Schedule, action: Action) -> int:
    """1 for what goes the other way: the second direction, or the way up a V."""
    going_up = schedule.num_stages > schedule.num_ranks and action.stage >= schedule.num_ranks
    return int(going_up or schedule.direction_of(action.microbatch) > 0)
