"""What the command does before torch is needed."""

import json
import subprocess
import sys

import pytest

import lightning_dualpipe
from lightning_dualpipe.cli import main
from lightning_dualpipe.schedules import Costs, build_schedule
from lightning_dualpipe.schedules.draw import draw_text
from tests.marks import needs


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in ("fit", "validate", "test", "predict", "draw", "plan"))


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-dualpipe {lightning_dualpipe.__version__}\n"


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["draw"], ["draw", "--ranks", "3"], ["plan", "--gpus", "0"], ["fitt"]]
)
def test_what_needs_no_torch_does_not_wait_for_it(args: list[str]) -> None:
    script = f"import sys; from lightning_dualpipe.cli import main; main({args}); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "'lightning_dualpipe.cli'" in done.stdout
    assert "'torch'" not in done.stdout
    assert "'lightning'" not in done.stdout


def test_a_misspelt_command_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err == "lightning-dualpipe: error: there is no command 'fitt'; did you mean 'fit'?\n"


def test_a_schedule_is_drawn_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    args = "--schedule zb1p --ranks 2 --microbatches 3 --forward 1,2 --backward-weight 0.5 --send 0.25"
    assert main(["draw", *args.split()]) == 0
    costs = Costs(forward=(1.0, 2.0), backward_weight=0.5, send=0.25)
    assert capsys.readouterr().out == draw_text(build_schedule("zb1p", 2, 3), costs)


@needs("matplotlib")
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_schedule_is_drawn_as_a_picture(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "--overlapped", "2", "--output", f"pictures/dualpipe.{suffix}"]) == 0
    said = capsys.readouterr().out.strip()
    assert said == f"pictures/dualpipe.{suffix}"
    with open(said, "rb") as picture:
        assert picture.read(200).lstrip().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


def test_a_schedule_is_written_as_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "--ranks", "2", "--microbatches", "4", "--output", "traces/dualpipe.json"]) == 0
    assert capsys.readouterr().out == "traces/dualpipe.json\n"
    with open("traces/dualpipe.json") as file:
        slices = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]
    schedule = build_schedule("dualpipe", 2, 4)
    assert len(slices) == sum(map(len, schedule.steps))


REFUSED = {
    "--ranks 3": "num_ranks=3: dualpipe mirrors one half of the ranks",
    "--schedule dualpip": "did you mean 'dualpipe'?",
    "--microbatches 0": "num_microbatches=0: a step has at least 1 microbatch",
    "--forward 1,2": "forward has 2 numbers, the schedule 4 stages",
    "--send -1": "send=-1.0: a duration is finite and at least 0",
    "--output x.bmp": "end its name in .png, .svg or .pdf",
    "--width 0": "--width 0: at least 1 column",
    "--width -3": "--width -3: at least 1 column",
    "--ranks two": "argument --ranks: invalid int value: 'two'",
    "--forward one": "argument --forward: invalid cost value: 'one'",
    "--rank-count 2": "unrecognized arguments: --rank-count 2",
}


@pytest.mark.parametrize("args", REFUSED)
def test_what_cannot_be_drawn_is_explained_in_one_message(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["draw", *args.split()])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert code == 2
    assert REFUSED[args] in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_without_matplotlib_text_is_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["draw", "--output", "x.png"]) == 2
    assert 'pip install "lightning-dualpipe[draw]"' in capsys.readouterr().err
