"""A Lightning checkpoint in one file: how it takes its place, and what is wrong with one that cannot be read."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_dualpipe.checkpoint.manifest import REMEDY
from lightning_dualpipe.errors import CheckpointError, ConfigurationError

__all__ = ["UNREADABLE", "loaded", "not_whole", "written_whole"]

# What torch.load and those who look into its result raise of a file that is empty, cut, or something else.
UNREADABLE = (
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
_VERSION = "pytorch-lightning_version"


def loaded(load: Callable[[], dict[str, Any]], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``load`` reads of ``path``.

    Raises:
        CheckpointError: the file is not there, was cut, would run code, or is none of Lightning's.
    """
    try:
        found = load()
    except UNREADABLE as error:
        raise not_whole(path, error) from error
    if not isinstance(found, dict) or _VERSION not in found:
        holds = ", ".join(map(str, list(found)[:6])) if isinstance(found, dict) else f"a {type(found).__name__}"
        raise CheckpointError(f"{path} is no Lightning checkpoint: it has no {_VERSION}, but {holds}. {REMEDY}")
    return found


def not_whole(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    if isinstance(error, OSError):
        return CheckpointError(f"{path} cannot be read: {error}. {REMEDY}")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return CheckpointError(f"{path} is no whole Lightning checkpoint: it is empty. {REMEDY}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, pickle.UnpicklingError):  # of these lines, most are about how to load it nevertheless
        if (name := re.search(r"GLOBAL (\S+)", str(error))) is not None:
            return CheckpointError(f"{path} would run code when it is loaded: it asks for {name[1]}. {REMEDY}")
        lines = [line for line in lines if "Unsupported" in line] or ["it holds more than data"]
    told = lines[0].rstrip(".") if lines else ""
    if told.startswith("mmap can only be used"):
        return CheckpointError(f"{path} is no whole Lightning checkpoint: it is no archive of torch.save. {REMEDY}")
    return CheckpointError(
        f"{path} is no whole Lightning checkpoint: {type(error).__name__}{': ' * bool(told)}{told}. {REMEDY}"
    )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` at the end: until then, and if anything goes wrong, that is as before.

    Raises:
        ConfigurationError: it cannot be written there.
    """
    written = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield written
        with open(written, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    except (OSError, RuntimeError) as error:  # torch's own writer tells of a full disk by the latter
        raise ConfigurationError(f"{path} cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            written.unlink(missing_ok=True)
