"""Schedules by name."""

from difflib import get_close_matches

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.schedules.action import Schedule
from lightning_dualpipe.schedules.dualpipe import dualpipe, dualpipev
from lightning_dualpipe.schedules.one_f_one_b import gpipe, one_f_one_b
from lightning_dualpipe.schedules.zero_bubble import zb1p

__all__ = ["SCHEDULES", "build_schedule"]

SCHEDULES = ("dualpipe", "dualpipev", "zb1p", "1f1b", "gpipe")


def build_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """One of ``SCHEDULES``, for any number of ranks (``dualpipe``: even) and of microbatches from 1 up."""
    problems = _problems(name, num_ranks, num_microbatches)
    if problems:
        raise ConfigurationError.of("this schedule cannot be built", problems)
    make = {"dualpipe": dualpipe, "dualpipev": dualpipev, "zb1p": zb1p, "1f1b": one_f_one_b, "gpipe": gpipe}[name]
    return make(num_ranks, num_microbatches)


def _problems(name: str, num_ranks: int, num_microbatches: int) -> list[str]:
    problems = []
    if name not in SCHEDULES:
        nearest = get_close_matches(name.lower(), SCHEDULES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        problems.append(f"schedule={name!r} is none of {', '.join(SCHEDULES)}{hint}")
    if num_ranks < 1:
        problems.append(f"num_ranks={num_ranks}: a pipeline has at least 1 rank")
    elif name == "dualpipe" and num_ranks % 2:
        problems.append(
            f"num_ranks={num_ranks}: dualpipe mirrors one half of the ranks onto the other, so their number is even; "
            f"take {num_ranks + 1}, or schedule='dualpipev', which runs on any number"
        )
    if num_microbatches < 1:
        problems.append(f"num_microbatches={num_microbatches}: a step has at least 1 microbatch")
    return problems
