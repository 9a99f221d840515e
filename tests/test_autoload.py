"""``Trainer(strategy="dualpipe")`` in a program that imports only lightning, from an installed wheel.

Programs run in processes of their own, because what counts is what is imported when. Each prints
its answers as JSON; the import hook itself is then tested in this process, on a stand-in for Lightning.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lightning_dualpipe import _autoload

ONLY_LIGHTNING = """
import json, sys
import torch
after_torch = [name for name in sys.modules if name.partition(".")[0] in ("lightning", "lightning_dualpipe")]
import lightning as L
from lightning.pytorch import strategies
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
after_lightning = [name for name in sys.modules if name.startswith("lightning_dualpipe")]

cli = LightningCLI(BoringModel, run=False, args=["--config", "train.yaml"])
flags = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
trainers = [cli.trainer, *(L.Trainer(strategy=name, **flags) for name in ("dualpipe", "dualpipev", "DualPipe"))]
print(json.dumps({
    "after torch": after_torch,
    "after lightning": after_lightning,
    "home": sys.modules["lightning_dualpipe"].__file__,
    "names": strategies.StrategyRegistry.available_strategies(),
    "loader": type(strategies.__spec__.loader).__name__,
    "trainers": [[type(t.strategy).__name__, t.strategy.schedule] for t in trainers],
}))
"""
SWITCHED_OFF = """
import json, sys
import lightning as L
flags = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
assert "lightning_dualpipe" not in sys.modules
try:
    L.Trainer(strategy="dualpipe", **flags)
except ValueError as error:
    message = str(error)
import lightning_dualpipe  # late: the registry exists already
print(json.dumps([message, type(L.Trainer(strategy="dualpipe", **flags).strategy).__name__]))
"""
BY_HAND = """
import json, sys
import lightning_dualpipe
early = [name for name in sys.modules if name in ("torch", "lightning", "numpy", "dataclasses", "importlib.abc")]
from lightning.pytorch.strategies import StrategyRegistry
known = sorted(name for name in StrategyRegistry if "dualpipe" in name)
import pytorch_lightning
try:
    pytorch_lightning.Trainer(strategy="dualpipe", accelerator="cpu", devices=1)
except ValueError as error:
    message = str(error)
print(json.dumps([early, known, message]))
"""


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages that holds the unpacked wheel, its entry points included."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def answers(program: str, site: Path, folder: Path | None = None, **environment: str) -> Any:
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What ONLY_LIGHTNING answers."""
    folder = tmp_path_factory.mktemp("program")
    flags = "strategy: dualpipev, accelerator: cpu, devices: 1, logger: false, enable_checkpointing: false"
    (folder / "train.yaml").write_text(f"trainer: {{{flags}}}\n")
    return answers(ONLY_LIGHTNING, site, folder=folder)


def test_a_program_that_imports_only_lightning_knows_the_names(found, site):
    assert found["home"].startswith(str(site))  # the wheel's, not this tree's
    assert {"dualpipe", "dualpipev", "ddp", "fsdp"} <= set(found["names"])  # beside the others
    assert found["trainers"][1:] == [
        ["DualPipeStrategy", "dualpipe"],
        ["DualPipeStrategy", "dualpipev"],
        ["DualPipeStrategy", "dualpipe"],  # Lightning lowers the name
    ]


def test_a_stock_lightning_cli_takes_the_flag_from_yaml(found):
    assert found["trainers"][0] == ["DualPipeStrategy", "dualpipev"]


def test_importing_torch_and_lightning_brings_in_two_small_modules_and_leaves_no_trace(found):
    assert sorted(found["after torch"]) == ["lightning_dualpipe", "lightning_dualpipe._autoload"]
    assert sorted(found["after lightning"]) == sorted(found["after torch"])
    assert found["loader"] == "SourceFileLoader"


def test_with_autoload_switched_off_lightning_does_not_know_the_name_until_the_package_is_imported(site):
    message, strategy = answers(SWITCHED_OFF, site, TORCH_DEVICE_BACKEND_AUTOLOAD="0")

    assert "invalid strategy name: `strategy='dualpipe'`" in message  # the heading in docs/faq.md
    assert strategy == "DualPipeStrategy"


def test_importing_the_package_by_hand_is_light_and_enough(site):
    early, known, message = answers(BY_HAND, site, TORCH_DEVICE_BACKEND_AUTOLOAD="0")

    assert early == []
    assert known == ["dualpipe", "dualpipev"]
    assert "import lightning.pytorch as pl" in message  # pytorch_lightning: refused with what to write instead


REGISTRY = """
class Registry(dict):
    def register(self, name, strategy, description, **options):
        if name in self:
            raise ValueError(f"{name} is registered already")
        self[name] = (strategy, options)

StrategyRegistry = Registry()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module that the hook takes for lightning.pytorch.strategies; gives a way to write and import it."""
    name = "stand_in_for_strategies"
    monkeypatch.setattr(_autoload, "LIGHTNING", name)
    monkeypatch.setattr(
        sys, "meta_path", [finder for finder in sys.meta_path if "_autoload" not in type(finder).__module__]
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(source: str = REGISTRY):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    sys.modules.pop(name, None)


def test_the_names_are_registered_when_lightning_is_imported_after_the_hook(stand_in):
    _autoload.install()
    assert set(stand_in().StrategyRegistry) == {"dualpipe", "dualpipev"}


def test_the_names_are_registered_at_once_when_lightning_was_imported_before_the_hook(stand_in):
    module = stand_in()
    assert not module.StrategyRegistry
    _autoload.install()
    assert set(module.StrategyRegistry) == {"dualpipe", "dualpipev"}


def test_installing_many_times_changes_nothing(stand_in):
    finders = len(sys.meta_path)
    for _ in range(3):
        _autoload.install()
    module = stand_in()
    before = dict(module.StrategyRegistry)
    _autoload.install()
    assert module.StrategyRegistry == before
    assert len(sys.meta_path) == finders + 1


def test_a_reloaded_lightning_learns_the_names_again(stand_in):
    _autoload.install()
    assert set(importlib.reload(stand_in()).StrategyRegistry) == {"dualpipe", "dualpipev"}


def test_a_name_somebody_else_registered_is_left_to_them(stand_in):
    _autoload.install()
    module = stand_in(REGISTRY + "StrategyRegistry['dualpipe'] = 'theirs'\n")
    assert module.StrategyRegistry["dualpipe"] == "theirs"
    assert "dualpipev" in module.StrategyRegistry


def test_a_lightning_that_cannot_be_imported_says_why_itself(stand_in):
    _autoload.install()
    with pytest.raises(ZeroDivisionError):
        stand_in("1 / 0")


def test_a_registry_we_do_not_understand_is_a_warning_and_no_error(stand_in):
    _autoload.install()
    with pytest.warns(UserWarning, match="could not register its strategies"):
        stand_in("StrategyRegistry = object()\n")


def test_tools_that_look_at_the_module_without_importing_it_see_its_own_loader(stand_in):
    stand_in()
    del sys.modules["stand_in_for_strategies"]
    _autoload.install()
    spec = importlib.util.find_spec("stand_in_for_strategies")
    assert spec.loader.get_source("stand_in_for_strategies") == REGISTRY
    assert "stand_in_for_strategies" not in sys.modules


@pytest.mark.filterwarnings("error")
def test_importing_torch_goes_on_whatever_happens(monkeypatch, capsys):
    def fail():
        raise RuntimeError("no such registry")

    monkeypatch.setattr(_autoload, "install", fail)
    _autoload.autoload()  # even where warnings are errors
    assert "no such registry" in capsys.readouterr().err
