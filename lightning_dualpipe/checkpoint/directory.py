"""Where a checkpoint directory is while it is written, and how it takes its place at once.

    step=10.ckpt                    the previous one of that name, whole until the new one is
    .step=10.ckpt.writing-4f1d...   all ranks write here; then one rename makes it step=10.ckpt
    .step=10.ckpt.removed-4f1d...   on its way out: whoever is killed while deleting leaves no half checkpoint
    .step=10.ckpt.replaced-4f1d...  the previous one, for a moment, where names cannot be exchanged

What has a name that begins with a dot is looked at if nothing has the name without, and goes when that is saved again.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from lightning_dualpipe.errors import CheckpointError

__all__ = ["find", "is_directory", "put_in_place", "remove", "remove_remains", "staging"]

_WRITING, _REMOVED, _REPLACED = ".writing-", ".removed-", ".replaced-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def staging(target: Path, save: str) -> Path:
    return target.with_name(f".{target.name}{_WRITING}{save}")


def remove_remains(target: Path) -> None:
    """What saves and removals of this name have left that did not come to their end."""
    for mark in (_WRITING, _REMOVED, *([_REPLACED] if os.path.lexists(target) else [])):
        for path in _marked(target, mark):
            _delete(path)


def find(target: Path) -> Path:
    """``target``, or what it was when its replacement was cut short."""
    return next(iter(_marked(target, _REPLACED)), target) if not os.path.lexists(target) else target


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether this is a path in a file system, and a checkpoint there would be a directory."""
    return "://" not in os.fspath(path) and find(Path(path)).is_dir()


def put_in_place(written: Path, target: Path, save: str) -> None:
    """``written`` becomes ``target``; what had that name before is removed. At no moment is there neither."""
    _sync_directory(written)
    if os.path.lexists(target):
        if not _exchange(written, target):
            aside = target.with_name(f".{target.name}{_REPLACED}{save}")
            os.rename(target, aside)
            os.rename(written, target)
            written = aside
        _sync_directory(target.parent)
        _delete(written)
    else:
        os.rename(written, target)
        _sync_directory(target.parent)


def remove(target: Path) -> None:
    """At once for those who look for it, then its files."""
    if target.is_dir() and not target.is_symlink():
        aside = target.with_name(f".{target.name}{_REMOVED}{os.getpid()}")
        _delete(aside)
        os.rename(target, aside)
        _delete(aside)
    else:
        target.unlink(missing_ok=True)


def _marked(target: Path, mark: str) -> list[Path]:
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}{mark}")]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Both names at once, whatever is behind them. False if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise CheckpointError(f"{one} cannot take the place of {other}: {os.strerror(code)}")


def _sync_directory(path: Path) -> None:
    """A new name is on the disk when its directory is."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no use for it
            raise
    finally:
        os.close(handle)
