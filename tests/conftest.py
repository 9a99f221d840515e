"""Every test starts in an empty folder with the same random numbers, and leaves nothing behind.

What "nothing" is: ``tests/leaks.py``.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from tests.leaks import SESSION_ID, SESSION_NAME, Leaks
from tests.marks import skip_without_gpus

ROOT = Path(__file__).parent.parent


def pytest_configure() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; results depend on no thread count
    os.environ[SESSION_NAME] = SESSION_ID
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started with "&" by a script: so would be all it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests leave this folder, and start programs elsewhere, which must find the package all the same.
    if "PYTHONPATH" in os.environ:
        paths = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths if path)
    os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network
    # A temporary folder of this session's own, so that what is left there can be told from other programs'.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where it always was
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="dualpipe-tests-")
    # So are the token caches; matplotlib's list of fonts, which takes seconds to make, stays the user's.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("MPLCONFIGDIR", f"{cache}/matplotlib")
    os.environ["XDG_CACHE_HOME"] = f"{tempfile.tempdir}/cache"
    os.mkdir(os.environ["XDG_CACHE_HOME"])
    # After multiprocessing, which keeps the forkserver's socket there and has priority -100.
    Finalize(None, shutil.rmtree, args=(tempfile.tempdir,), kwargs={"ignore_errors": True}, exitpriority=-200)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("hosts") and "hosts" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="takes minutes, as root: pytest -m hosts"))
        for mark in item.iter_markers("gpu"):
            item.add_marker(skip_without_gpus(*mark.args))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """Set up first and torn down last, so that what a test's own fixtures clean up is no leak."""
    folder = Path.cwd()
    leaks = Leaks()
    _seed()
    os.chdir(tmp_path)  # a run that writes where it stands writes here
    yield
    os.chdir(folder)
    if found := leaks.found():
        pytest.fail("this test leaves behind:\n" + "\n".join(f"  - {line}" for line in found), pytrace=False)


def _seed() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as users get it: built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path
