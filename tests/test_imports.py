"""The architecture, held: who may import whom, and how large a piece may grow.

 L4  cli  examples  benchmarks
       |
 L3  strategy   deepseek_v3.module   plugins   data   metrics   callbacks          lightning
       |  |            |
 L2  pipeline     deepseek_v3 (rest)   checkpoint                        torch
       |    \\        /   \\             /
 L1    |     parallel     precision     recompute                        torch
       |         |
 L0  schedules   planner   interface   errors                            standard library

The tables below say it exactly. A new arrow is a decision, and is made here.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_dualpipe"
FILES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Place:
    """A folder or a file of the package, by what it may import besides itself and the standard library."""

    own: set[str] = field(default_factory=set)
    libraries: set[str] = field(default_factory=set)
    for_types: set[str] = field(default_factory=set)  # under TYPE_CHECKING only: never at run time


L0 = {"schedules", "planner", "interface", "errors"}
L1 = {"parallel", "precision", "recompute"}
TORCH = {"torch", "numpy"}
LIGHTNING = TORCH | {"lightning", "lightning_utilities", "torchmetrics", "typing_extensions"}
PLACES = {
    "errors": Place(),
    "interface": Place(own={"errors"}, for_types={"torch"}),
    "schedules": Place(own={"errors"}),
    "planner": Place(own={"errors", "interface", "schedules"}),
    "parallel": Place(own={"errors", "interface"}, libraries=TORCH),
    "precision": Place(own={"errors", "interface"}, libraries=TORCH),
    "recompute": Place(own={"interface"}, libraries=TORCH),
    "pipeline": Place(own=L0 | L1, libraries=TORCH),
    "deepseek_v3": Place(own=L0 | L1, libraries=TORCH | {"safetensors"}),
    "checkpoint": Place(own=L0 | L1, libraries=TORCH | {"safetensors"}),
    "between_batches": Place(libraries=LIGHTNING),
    "strategy": Place(own=L0 | L1 | {"pipeline", "checkpoint", "plugins", "between_batches"}, libraries=LIGHTNING),
    "plugins": Place(own=L0 | L1, libraries=LIGHTNING),
    "deepseek_v3/module": Place(own=L0 | L1 | {"deepseek_v3", "metrics"}, libraries=LIGHTNING),
    "data": Place(own=L0, libraries=LIGHTNING),
    "metrics": Place(own=L0, libraries=LIGHTNING),
    "callbacks": Place(own=L0 | {"metrics", "between_batches"}, libraries=LIGHTNING),
    "cli": Place(
        own=L0 | L1 | {"__init__", "checkpoint", "deepseek_v3", "strategy", "data", "metrics", "callbacks"},
        libraries=LIGHTNING | {"jsonargparse", "yaml"},
    ),
    "_autoload": Place(own={"errors", "strategy"}),
    "__init__": Place(
        own={"_autoload"}, for_types={"strategy", "plugins", "deepseek_v3", "data", "checkpoint", "errors", "interface"}
    ),
}

# A library that may be absent: the only files that import it, besides what their place allows.
OPTIONAL = {
    "deep_ep": {"parallel/deepep.py"},
    "matplotlib": {"schedules/draw.py", "schedules/draw_record.py", "callbacks/loss_picture.py"},
    "tokenizers": {"data/tokenizer_files.py"},
    "transformer_engine": {"precision/te_backend.py"},
}


@dataclass(frozen=True)
class Import:
    name: str  # "torch", or a place of the package such as "schedules"
    for_types: bool
    at_top: bool  # when its module is imported, not when a function is called


def imports(file: Path) -> Iterator[Import]:
    def visit(node: ast.AST, *, for_types: bool, at_top: bool) -> Iterator[Import]:
        for name in names_of(node):
            yield Import(name, for_types, at_top)
        inside = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body
            yield from visit(child, for_types=for_types or guarded, at_top=inside)

    def names_of(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (place_of(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.relative_to(ROOT)}:{node.lineno}: a relative import"
            module = node.module or ""
            whole = module == "lightning_dualpipe"
            yield from (place_of(f"{module}.{alias.name}") for alias in node.names) if whole else (place_of(module),)

    def place_of(dotted: str) -> str:
        first, _, rest = dotted.partition(".")
        if first != "lightning_dualpipe":
            return first
        part = rest.partition(".")[0]  # what is no folder and no file is a name of the package itself
        return part if part and ((PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()) else "__init__"

    return visit(ast.parse(file.read_text()), for_types=False, at_top=True)


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def place(file: Path) -> str:
    """The most particular entry of the table: deepseek_v3/module before deepseek_v3."""
    whole = name_of(file).removesuffix(".py")
    return whole if whole in PLACES else whole.partition("/")[0]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_follow_the_table(file):
    assert place(file) in PLACES, f"{name_of(file)} has no place in the table above"
    here = PLACES[place(file)]
    mine = {place(file).partition("/")[0]}
    optional = {library for library, files in OPTIONAL.items() if name_of(file) in files}
    allowed = here.own | here.libraries | mine | optional | sys.stdlib_module_names

    extra = {
        found.name
        for found in imports(file)
        if found.name not in allowed and not (found.for_types and found.name in here.for_types)
    }
    listed = sorted(allowed - sys.stdlib_module_names)
    assert not extra, f"{name_of(file)} imports {sorted(extra)}; {place(file)} may import {listed}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_optional_libraries_are_imported_where_they_are_used(file):
    """At the top of a file they would be needed by everybody who imports it."""
    wrong = [found.name for found in imports(file) if found.name in OPTIONAL and found.at_top and not found.for_types]
    assert not wrong, f"{name_of(file)} imports {wrong} at its top"


def test_the_table_itself_keeps_the_layers_apart():
    """A table that is widened by mistake would let everything pass."""
    below_lightning = L0 | L1 | {"pipeline", "deepseek_v3", "checkpoint"}
    assert not PLACES["deepseek_v3"].own & {"pipeline", "strategy", "data"}
    assert not (PLACES["pipeline"].own | PLACES["strategy"].own) & {"deepseek_v3"}
    assert not any(PLACES[name].libraries & {"lightning", "torchmetrics"} for name in below_lightning)
    assert not any(PLACES[name].libraries for name in L0)


def test_every_module_can_be_imported_without_the_optional_libraries():
    """Absent for our modules alone: other packages look into the metadata of what is installed, and believe it."""
    modules = [module_of(file) for file in FILES if file.stem != "__main__"]
    script = f"""
import builtins, importlib
original = builtins.__import__
def absent(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {{}}).get("__name__", "").startswith("lightning_dualpipe")
    if ours and name.partition(".")[0] in {[*OPTIONAL, "transformers"]}:
        raise ImportError(f"{{globals['__name__']}} imports {{name}}")
    return original(name, globals, locals, fromlist, level)
builtins.__import__ = absent
for name in {modules}:
    importlib.import_module(name)
"""
    run = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_and_no_function_is_too_long_to_hold_in_mind(file):
    length = len(file.read_text().splitlines())
    assert length <= 400, f"{name_of(file)} has {length} lines: is there a second idea in it?"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 80, f"{name_of(file)}: {node.name} has {lines} lines"


def texts() -> list[Path]:
    """The files git tracks or would: all of the project, nothing that was built."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [path for path in map(ROOT.joinpath, names) if path.is_file() and b"\0" not in path.read_bytes()[:1000]]


UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
SOMEBODYS = re.compile(r"""(?:^|[\s"'`=(:])/(?:home|root|tmp|work|Users|mnt)/""", re.MULTILINE)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git checkout")
@pytest.mark.parametrize(("pattern", "what"), [(UNFINISHED, "unfinished work"), (SOMEBODYS, "a path of one machine")])
def test_nothing_unfinished_and_no_path_of_a_machine_is_kept(pattern, what):
    found = [
        f"{path.relative_to(ROOT)}: {match.group().strip()}"
        for path in texts()
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert not found, f"{what}: {found}"
