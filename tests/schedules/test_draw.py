import builtins
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.schedules import SCHEDULES, Costs, build_schedule, draw_picture, draw_text

ROOT = Path(__file__).parent.parent.parent
SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def test_a_small_grid_by_hand():
    assert draw_text(build_schedule("1f1b", 2, 2)).splitlines()[:5] == [
        "1f1b: 2 ranks, 2 microbatches, time 9, 33.3% idle",
        "",
        "time   0   1   2   3   4   5   6   7   8",
        "rank 0 0F0 0F1 .   .   0B0---- .   0B1----",
        "rank 1 .   1F0 1B0---- 1F1 1B1---- .   .",
    ]


def test_every_step_stands_where_it_runs():
    """The grid read back: a cell is one unit of time."""
    schedule = build_schedule("dualpipe", 8, 23)
    lines = draw_text(schedule).splitlines()
    size = lines[2].index("1") - lines[2].index("0")
    margin = lines[2].index("0")
    for rank, steps in enumerate(schedule.steps):
        row = lines[3 + rank][margin:].ljust(size)
        shown = [row[at : at + size] for at in range(0, len(row), size)]
        starts = [cell for cell in "".join(shown).replace("-", " ").split() if cell != "."]
        assert starts == ["+".join(map(str, step)) for step in steps]


@pytest.mark.parametrize("width", [1, 40, 79, 10_000])
def test_long_grids_are_folded(width):
    text = draw_text(build_schedule("dualpipev", 3, 12), width=width)
    grid = [line for line in text.splitlines() if line.startswith(("time", "rank"))]
    assert max(map(len, grid)) <= max(width, len("rank 0 ") + 8)
    whole = [line for line in draw_text(build_schedule("dualpipev", 3, 12)).splitlines() if line.startswith("rank 2")]
    folded = [line.removeprefix("rank 2").strip() for line in grid if line.startswith("rank 2")]
    assert "".join(folded).replace(" ", "") == whole[0].removeprefix("rank 2").replace(" ", "")


@pytest.mark.parametrize(
    "costs",
    [
        Costs(97.3, 111.6, 29.8, 128.5, send=1.2),
        Costs(1e-3, 2e-3, 1e-3),
        Costs((1, 2, 3, 4), (2, 2, 2, 2), (1, 1, 1, 1)),
        Costs(1, 0, 0),
        Costs(0, 0, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["zb1p", "dualpipe"])
def test_any_costs_can_be_drawn(name, costs, tmp_path):
    schedule = build_schedule(name, 4, 6)
    text = draw_text(schedule, costs)
    rows = [line for line in text.splitlines() if line.startswith("rank")]
    assert len(rows) == (4 if any((costs.forward, costs.backward_input)) else 0)
    draw_picture(schedule, costs, tmp_path / "picture.svg")


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_pictures_are_written_by_suffix(suffix, tmp_path):
    path = draw_picture(build_schedule("dualpipe", 4, 8), Costs(overlapped=2), tmp_path / f"schedule{suffix}")
    assert path == tmp_path / f"schedule{suffix}"
    assert path.read_bytes().startswith(SIGNATURES[suffix])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_a_picture(name, tmp_path):
    for schedule in (build_schedule(name, 2, 5), build_schedule(name, 2, 1).forward_only()):
        assert draw_picture(schedule, Costs(), str(tmp_path / "schedule.svg")).stat().st_size > 5000


@pytest.mark.parametrize("name", ["schedule.gif", "schedule", "schedule.png.txt"])
def test_another_suffix_is_refused_before_anything_is_drawn(name, tmp_path):
    with pytest.raises(ConfigurationError, match=r"end its name in \.png, \.svg or \.pdf"):
        draw_picture(build_schedule("gpipe", 2, 2), Costs(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch, tmp_path):
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingPackageError, match=r'pip install "lightning-dualpipe\[draw\]"'):
        draw_picture(build_schedule("gpipe", 2, 2), Costs(), tmp_path / "schedule.png")
    assert draw_text(build_schedule("gpipe", 2, 2))


def test_the_example_runs_without_torch(tmp_path):
    """Blocked, not only unused."""
    script = ROOT / "examples" / "draw_schedule.py"

    def run(*args):
        code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    assert "rank 0 0F0 0F1 0F2 3F4 3I4 3W4 3F5 0F3+3B5" in run() == run("dualpipe") == run("dualpipe", "4")
    shown = run("dualpipev", "3", "6", str(tmp_path / "schedule.png"))
    assert str(tmp_path / "schedule.png") in shown
    assert (tmp_path / "schedule.png").exists()
