"""Schedules written out: a change of one of them has to be looked at.

``tests/golden`` holds ``str(schedule)``, ``format_programs(lower(schedule))`` and ``draw_text(schedule)``.
"""

from pathlib import Path

import pytest

from lightning_dualpipe.schedules import Schedule, build_schedule, check, draw_text, format_programs, lower

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches"),
    [
        ("dualpipe", 4, 8),
        ("dualpipe", 8, 20),
        ("dualpipe", 4, 5),
        ("dualpipev", 4, 10),
        ("zb1p", 4, 8),
        ("1f1b", 4, 8),
        ("gpipe", 4, 4),
    ],
)
def test_schedules_equal_their_golden_text(name, num_ranks, num_microbatches):
    golden = (GOLDEN / f"{name}_{num_ranks}x{num_microbatches}.txt").read_text()
    assert str(build_schedule(name, num_ranks, num_microbatches)) == golden
    check(Schedule.parse(golden))


def test_lowered_programs_equal_their_golden_text():
    lowered = format_programs(lower(build_schedule("dualpipe", 4, 8)))
    assert lowered == (GOLDEN / "dualpipe_4x8_lowered.txt").read_text()


def test_the_grid_equals_its_golden_text():
    assert draw_text(build_schedule("dualpipe", 4, 8)) == (GOLDEN / "dualpipe_4x8_grid.txt").read_text()
