"""The README and the docs, held to what is true: commands, code blocks, links, and quoted errors.

The two commands themselves are run by ``.ci/run``, in an environment of their own.
"""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lightning_dualpipe import callbacks

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "examples" / "evaluate.md"]
PAGES = [README, *OTHERS, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def test_the_two_commands_name_what_is_there():
    train, tests = blocks(README, "bash")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    for command in (train, tests):
        assert "-c constraints-cpu.txt" in command
        (asked,) = re.findall(r"'\.\[(.*?)\]'", command)
        assert set(asked.split(",")) <= extras.keys()
    (config,) = re.findall(r"--config (\S+)", train)
    assert (ROOT / config).is_file()


def test_the_quickstart_of_ci_must_leave_what_it_prints_and_learn():
    """``.ci/run`` trains for a minute, and lets this script judge."""
    printed = {
        "checkpoint": "last.ckpt",
        "metrics log": "metrics.csv",
        "loss picture": "a.png",
        "schedule picture": "b",
    }
    Path("log").write_text("\n".join(f"{what:16}   {path}" for what, path in printed.items()))

    def verdict(*losses):
        Path("metrics.csv").write_text("\n".join(["step,train_loss,val_loss", *losses, ""]))
        script = [sys.executable, str(ROOT / ".ci" / "check_quickstart.py"), "log"]
        return subprocess.run(script, capture_output=True, text=True).stderr

    learnt = ("9,5.5,", "9,,5.6", "19,3.1,")
    assert "not there: checkpoint, loss picture, schedule picture" in verdict(*learnt)
    for path in printed.values():
        Path(path).touch()
    assert verdict(*learnt) == ""
    assert "should fall by 0.5 at least, it went [5.5] to [5.4]" in verdict("9,5.5,", "19,5.4,")
    assert "should fall" in verdict("9,5.5,")


def test_the_quickstart_in_one_process_reads_the_same_batches():
    (command,) = re.findall(
        r"^lightning-dualpipe .*--trainer.strategy auto.*$", QUICKSTART.read_text(), flags=re.MULTILINE
    )
    config = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    strategy = config["trainer"]["strategy"]["init_args"]
    data_ranks = config["trainer"]["devices"] // strategy["pipeline_parallel_size"]
    assert f"--data.batch_size {data_ranks * config['data']['init_args']['batch_size']}" in command


@pytest.mark.slow
def test_the_python_of_the_readme_trains():
    (program,) = blocks(README, "python")
    Path("train.py").write_text(program)
    assert "`Trainer.fit` stopped: `max_steps=20` reached" in run("train.py")


def test_the_yaml_of_the_readme_is_what_the_command_takes():
    """The second block lies over the first, as a second --config does."""
    configs = []
    for index, block in enumerate(blocks(README, "yaml")):
        Path(f"{index}.yaml").write_text(block)
        configs += ["--config", f"{index}.yaml"]

    printed = run("-m", "lightning_dualpipe.cli", "fit", *configs, "--print_config")
    assert "class_path: lightning_dualpipe.DualPipeStrategy" in printed
    assert "num_hidden_layers: 8" in printed


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_callback_is_explained_with_its_arguments_and_a_configuration_of_it(name):
    page = ROOT / "docs" / "callbacks.md"
    (section,) = re.findall(rf"^## `{name}`\n(.*?)(?=^## |\Z)", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for argument in inspect.signature(getattr(callbacks, name)).parameters:
        assert f"| `{argument}` |" in section

    def configured(block):
        found = yaml.safe_load(block)
        return found["trainer"]["callbacks"] if isinstance(found, dict) else found

    everything, *_ = blocks(page, "yaml")
    (own,) = re.findall(r"^```yaml\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    for entries in (configured(everything), configured(own)):
        (entry,) = (entry for entry in entries if entry["class_path"] == f"lightning_dualpipe.callbacks.{name}")
        getattr(callbacks, name)(**entry.get("init_args", {}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_docs_is_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def test_the_headings_of_the_faq_are_messages_that_are_really_printed():
    """A heading is an error text; an ellipsis stands for what differs from case to case."""
    site = Path(find_spec("lightning").origin).parent.parent
    sources = [
        *(ROOT / "lightning_dualpipe").rglob("*.py"),
        site / "lightning/pytorch/trainer/connectors/accelerator_connector.py",
        site / "lightning_utilities/core/imports.py",
        site / "torch/__init__.py",
    ]
    said = "\n".join(text for source in sources for text in strings(source))
    headings = re.findall(r"^## `(.*)`$", (ROOT / "docs" / "faq.md").read_text(), flags=re.MULTILINE)
    assert headings

    invented = [part for heading in headings for part in heading.split("…") if part not in said]
    assert not invented


def strings(source: Path) -> list[str]:
    """The texts in a file; of f-strings the fixed parts."""

    def fixed(value: ast.expr) -> str:
        return str(value.value) if isinstance(value, ast.Constant) else "…"

    nodes = list(ast.walk(ast.parse(source.read_text())))
    formatted = ["".join(map(fixed, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    return formatted + [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
