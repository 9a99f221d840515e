"""What a test needs beyond a CPU, said in a line above it:

    @needs_cuda
    @needs("transformers")

Where it is not there, the test is skipped and this is the reason shown. ``pytest -m gpu`` runs what needs a GPU,
``pytest -m hosts`` what needs two hosts, which are network namespaces and need root.

A program that cannot share this environment has one of its own, and a variable that says where:

    LIGHTNING_DUALPIPE_VLLM=vllm-venv python -m pytest tests/serving
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = [
    "needs",
    "needs_commands",
    "needs_cuda",
    "needs_gpus",
    "needs_patience",
    "needs_program",
    "needs_root",
    "needs_te",
    "program",
    "skip_without_gpus",
]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the package {package}")


def program(name: str) -> Path:
    """Of the environment that ``LIGHTNING_DUALPIPE_…`` names: ``vllm`` is in ``$LIGHTNING_DUALPIPE_VLLM/bin``."""
    return Path(os.environ.get(_variable(name), "")).absolute() / "bin" / name


def needs_program(name: str) -> pytest.MarkDecorator:
    there = _variable(name) in os.environ and program(name).is_file()
    return pytest.mark.skipif(not there, reason=f"needs {_variable(name)}, an environment with {name}")


def _variable(name: str) -> str:
    return f"LIGHTNING_DUALPIPE_{name.upper()}"


def needs_commands(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs the commands {', '.join(missing)}")


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.gpu(count)  # tests/conftest.py adds the following


def skip_without_gpus(count: int = 1) -> pytest.MarkDecorator:
    # A string is evaluated when the test is due: tests that need no torch then do not import it.
    too_few = f"__import__('torch').cuda.device_count() < {count}"
    return pytest.mark.skipif(too_few, reason=f"needs {count} CUDA device{'s' if count > 1 else ''}")


# Whole programs that hang on purpose: minutes, most of it imports. DUALPIPE_PATIENCE=1 pytest -m slow tests/strategy
needs_patience = pytest.mark.skipif("DUALPIPE_PATIENCE" not in os.environ, reason="set DUALPIPE_PATIENCE=1 to run it")
needs_cuda = needs_gpus(1)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces")
needs_te = needs("transformer_engine")
