"""The page that derives DualPipe: what it says that programs and commands print is what they print."""

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_dualpipe.cli.drawing import draw
from lightning_dualpipe.cli.planning import plan

PAGE = Path(__file__).parent.parent / "docs" / "how_dualpipe_works.md"
TEXT = PAGE.read_text()
SHOWN = re.findall(r"^```(python|bash)\n(.*?)^```\n\n```text\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
PICTURES = re.findall(r"^!\[.*?\]\((.*?)\)\n\n\*`lightning-dualpipe draw (.*?)`", TEXT, flags=re.MULTILINE)


def printed(language: str, source: str) -> str:
    if language == "python":
        return _said(lambda: exec(compile(source, PAGE.name, "exec"), {}))
    return "".join(_printed_by(line) for line in source.splitlines())


def _printed_by(line: str) -> str:
    """Of a command of ours, whole or its first lines: ``… | head -1``."""
    line, _, number = line.partition(" | head -")
    _, command, *args = shlex.split(line)
    said = _said(lambda: {"draw": draw, "plan": plan}[command](args))
    return "".join(said.splitlines(keepends=True)[: int(number)]) if number else said


def _said(run: Callable[[], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()
    return out.getvalue()


@pytest.mark.parametrize(("language", "source", "shown"), SHOWN, ids=[f"block {i + 1}" for i in range(len(SHOWN))])
def test_what_the_page_shows_is_printed(language, source, shown):
    assert shown == printed(language, source)


def test_every_program_every_command_and_every_picture_of_the_page_is_checked():
    assert sum(language == "python" for language, *_ in SHOWN) == TEXT.count("```python")
    ours = re.findall(r"^```bash\nlightning-dualpipe", TEXT, flags=re.MULTILINE)
    assert sum(language == "bash" for language, *_ in SHOWN) == len(ours)
    assert len(PICTURES) == TEXT.count("![")


@pytest.mark.parametrize(("picture", "command"), PICTURES, ids=[name for name, _ in PICTURES])
def test_a_picture_is_where_its_command_puts_it_and_small(picture, command):
    args = shlex.split(command)
    assert PAGE.parent / picture == PAGE.parent.parent / args[args.index("--output") + 1]
    assert (PAGE.parent / picture).stat().st_size < 120_000
