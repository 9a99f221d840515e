"""Which checkpoint a run goes on from when nobody is there to choose: the newest that is intact."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from lightning_dualpipe.checkpoint.manifest import MANIFEST
from lightning_dualpipe.checkpoint.single_file import UNREADABLE, not_whole
from lightning_dualpipe.checkpoint.stored import open_stored
from lightning_dualpipe.errors import CheckpointError, ConfigurationError

__all__ = ["newest_checkpoint"]


def newest_checkpoint(folder: str | os.PathLike[str], *, thorough: bool = True) -> str | None:
    """The intact checkpoint of most steps in ``folder`` and the folders in it; None if there is no checkpoint at all.

    Damaged ones are skipped with a warning. A script that torchrun or SLURM may start again begins with

        trainer.fit(model, data, ckpt_path=newest_checkpoint("checkpoints"))

    Args:
        thorough: read every byte of directories; otherwise all but the tensors, whose blocks are checked when they
            are loaded. Single files have no checksums: those that are cut are noticed, not those with a flipped bit.

    Raises:
        CheckpointError: there are checkpoints, and none is intact, or only one of step 0, as ``import`` writes it:
            beginning anew must be somebody's decision.
        ConfigurationError: ``folder`` is a checkpoint itself, or another file: there is none in it, and never will be.
    """
    if (is_file := Path(folder).is_file()) or (Path(folder) / MANIFEST).exists():
        raise ConfigurationError(
            f"{folder} is {'a file' if is_file else 'a checkpoint'}, and the newest checkpoint is looked for in a "
            "folder; give the folder it is in, or this as ckpt_path itself"
        )
    problems = []
    found: list[tuple[int, float, Path]] = []
    for path in _candidates(Path(folder)):
        try:
            found.append((_step_of(path), path.stat().st_mtime, path))
        except CheckpointError as error:
            problems.append(str(error))
    for step, _, path in sorted(found, reverse=True):
        try:
            if path.is_dir():
                stored = open_stored(path)
                stored.verify() if thorough else stored.state()
        except CheckpointError as error:
            problems.append(str(error))
        else:
            if step == 0 and problems:
                raise _none_intact(f"{folder} is intact but {path}, which is a beginning", problems)
            _warn(problems)
            return str(path)
    if problems:
        raise _none_intact(f"{folder} is intact", problems)
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    """What ends in .ckpt; links lead to others of them, and hidden names to what was never finished."""
    for parent, folders, files in os.walk(folder):
        names = [name for name in (*folders, *files) if name.endswith(".ckpt") and not name.startswith(".")]
        yield from (Path(parent) / name for name in sorted(names) if not (Path(parent) / name).is_symlink())
        folders[:] = [name for name in folders if not name.endswith(".ckpt") and not name.startswith(".")]


def _step_of(path: Path) -> int:
    if path.is_dir():
        return open_stored(path).manifest.step
    try:
        found = torch.load(path, weights_only=True, mmap=True, map_location="meta")
        return int(found["global_step"])
    except UNREADABLE as error:
        raise not_whole(path, error) from None


def _none_intact(words: str, problems: list[str]) -> CheckpointError:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return CheckpointError(f"no checkpoint in {words}; move these away to begin anew:\n{listed}")


def _warn(problems: list[str]) -> None:
    for problem in problems:
        warnings.warn(f"skipped: {problem}", stacklevel=3)
