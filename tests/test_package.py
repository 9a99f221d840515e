"""What is installed: the wheel's contents, the public names, and the packages it asks for."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_dualpipe
from tests.test_imports import FILES, PLACES, imports

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints-cpu.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {canonicalize_name(pin.name): pin for pin in CONSTRAINTS}


@pytest.mark.parametrize("name", lightning_dualpipe.__all__)
def test_every_public_name_is_there(name):
    home = import_module(f"lightning_dualpipe.{lightning_dualpipe._MODULE_OF[name]}")
    assert getattr(lightning_dualpipe, name) is getattr(home, name)


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="has no attribute 'DualPipStrategy'"):
        lightning_dualpipe.DualPipStrategy  # noqa: B018


def test_dir_lists_the_public_names():
    assert set(lightning_dualpipe.__all__) <= set(dir(lightning_dualpipe))


def test_type_checkers_are_told_what_programs_find():
    """The imports under TYPE_CHECKING are the table that ``__getattr__`` reads, and ``__all__``."""
    tree = ast.parse(Path(lightning_dualpipe.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in guarded.body for alias in node.names}

    found = {name: f"lightning_dualpipe.{module}" for name, module in lightning_dualpipe._MODULE_OF.items()}
    assert told == found
    assert sorted(found) == sorted(lightning_dualpipe.__all__)


def test_the_wheel_holds_the_package_its_types_and_its_license_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_dualpipe").rglob("*.py")}
    info = f"lightning_dualpipe-{lightning_dualpipe.__version__}.dist-info"

    assert ours | {"lightning_dualpipe/py.typed", f"{info}/licenses/LICENSE"} <= names
    assert {name.partition("/")[0] for name in names} == {"lightning_dualpipe", info}


def test_the_wheel_announces_its_command_and_its_hook(wheel):
    info = f"lightning_dualpipe-{lightning_dualpipe.__version__}.dist-info"
    entry_points = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()

    assert "lightning-dualpipe = lightning_dualpipe.cli:main" in entry_points
    assert "[torch.backends]\nlightning_dualpipe = lightning_dualpipe._autoload:autoload" in entry_points


def test_installing_never_replaces_the_torch_one_has():
    """No upper bound, and no package that pins torch; older and CUDA builds down to 2.11 are welcome."""
    (torch,) = (Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch>"))
    assert {part.operator for part in torch.specifier} == {">="}
    assert all(Version(version) in torch.specifier for version in ("2.11.0+cu130", "2.13.0+cpu", "3.0.0"))


def test_every_library_that_is_imported_is_asked_for():
    """Not left to come with another one, which may stop asking for it."""
    by_hand = {"deep_ep"}  # on no package index
    imported = {found.name for file in FILES for found in imports(file) if not found.for_types}
    libraries = imported - PLACES.keys() - sys.stdlib_module_names - by_hand
    declared = {canonicalize_name(requirement.name) for requirement in requirements("draw", "hf", "te")}
    assert (
        not {canonicalize_name(name) for name in libraries} - declared - {"yaml"}
    )  # PyYAML, which jsonargparse is for


def requirements(*extras: str) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


def closure(requirements: list[Requirement]) -> set[str]:
    """Every package that gets installed with these, by the metadata of those installed here."""
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        requirement, asked_by_extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": asked_by_extra}):
            continue
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in seen and key[0] != "lightning-dualpipe":
                seen.add(key)
                waiting += [(Requirement(line), extra) for line in metadata.requires(key[0]) or ()]
    return {name for name, _ in seen}


def test_the_constraints_pin_everything_the_readme_installs():
    missing = closure(requirements("draw", "hf", "test")) - PINS.keys()
    assert not missing, f"constraints-cpu.txt does not pin {sorted(missing)}"


def test_the_constraints_agree_with_what_the_project_asks_for():
    for name, pin in PINS.items():
        (exactly,) = pin.specifier
        assert exactly.operator == "==", f"{pin} is no exact pin"
        for requirement in requirements("draw", "hf", "test", "lint", "docs"):
            if canonicalize_name(requirement.name) == name:
                assert exactly.version in requirement.specifier, f"{pin} against {requirement}"


def test_the_constraints_name_no_build_for_one_kind_of_accelerator():
    assert not [pin for pin in CONSTRAINTS if "nvidia" in pin.name or "cuda" in pin.name or "+" in str(pin.specifier)]


def test_the_command_is_a_module_too():
    """``python -m lightning_dualpipe.cli`` is what a launcher runs again on every rank."""
    run = subprocess.run(
        [sys.executable, "-m", "lightning_dualpipe.cli", "--help"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in ("fit", "validate", "test", "predict", "draw"))
