"""What a test needs beyond a CPU, said in a line above it:

    @needs_cuda
    @needs("transformers")

Where it is not there, the test is skipped and this is the reason shown. ``pytest -m gpu`` runs what needs a GPU,
``pytest -m hosts`` what needs two hosts, which are network namespaces and need root.
"""

import os
import shutil
from importlib.util import find_spec

import pytest

__all__ = ["needs", "needs_cuda", "needs_gpus", "needs_programs", "needs_root", "needs_te", "skip_without_gpus"]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the package {package}")


def needs_programs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs the programs {', '.join(missing)}")


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.gpu(count)  # tests/conftest.py adds the following


def skip_without_gpus(count: int = 1) -> pytest.MarkDecorator:
    # A string is evaluated when the test is due: tests that need no torch then do not import it.
    too_few = f"__import__('torch').cuda.device_count() < {count}"
    return pytest.mark.skipif(too_few, reason=f"needs {count} CUDA device{'s' if count > 1 else ''}")


needs_cuda = needs_gpus(1)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces")
needs_te = needs("transformer_engine")
