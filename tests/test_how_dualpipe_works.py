"""The page that derives DualPipe: what it says that programs and commands print is what they print."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from lightning_dualpipe.cli.drawing import draw
from lightning_dualpipe.cli.planning import plan

PAGE = Path(__file__).parent.parent / "docs" / "how_dualpipe_works.md"
TEXT = PAGE.read_text()
SHOWN = re.findall(r"^```(python|bash)\n(.*?)^```\n\n```text\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
PICTURES = re.findall(r"^!\[.*?\]\((.*?)\)\n\n\*`lightning-dualpipe draw (.*?)`", TEXT, flags=re.MULTILINE)


def printed(language: str, source: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == "python":
            exec(compile(source, PAGE.name, "exec"), {})
        else:
            for line in source.splitlines():
                _, command, *args = shlex.split(line)
                {"draw": draw, "plan": plan}[command](args)
    return out.getvalue()


@pytest.mark.parametrize(("language", "source", "shown"), SHOWN, ids=[f"block {i + 1}" for i in range(len(SHOWN))])
def test_what_the_page_shows_is_printed(language, source, shown):
    """Of a program all of it, of a command at least these lines, in this order."""
    found = printed(language, source)
    if language == "python":
        assert shown == found
    else:
        lines = iter(found.splitlines())
        assert [line for line in shown.splitlines() if line not in lines] == []


def test_every_program_and_every_picture_of_the_page_is_checked():
    assert sum(language == "python" for language, *_ in SHOWN) == TEXT.count("```python")
    assert len(PICTURES) == TEXT.count("![")


@pytest.mark.parametrize(("picture", "command"), PICTURES, ids=[name for name, _ in PICTURES])
def test_a_picture_is_where_its_command_puts_it_and_small(picture, command):
    args = shlex.split(command)
    assert PAGE.parent / picture == PAGE.parent.parent / args[args.index("--output") + 1]
    assert (PAGE.parent / picture).stat().st_size < 120_000
