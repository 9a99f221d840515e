"""``lightning-dualpipe consolidate`` and ``verify``: what to do with a checkpoint directory without a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_dualpipe.checkpoint.single_file import written_whole
from lightning_dualpipe.checkpoint.stored import open_stored, read_whole
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["consolidate", "verify"]


def consolidate(args: Sequence[str]) -> None:
    """Make one file, the one ``strategy="auto"`` would have written.

    Raises:
        CheckpointError: the directory is no checkpoint, or not as it was written.
        ConfigurationError: the file exists, or cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dualpipe consolidate",
        description="Make one Lightning checkpoint file of a checkpoint directory: any strategy resumes from it, and "
        "load_from_checkpoint opens it. Every byte is checked. The whole checkpoint is in memory while this runs.",
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    asked = parser.parse_args(args)
    if asked.file.exists() and not asked.overwrite:
        raise ConfigurationError(f"{asked.file} exists; pass --overwrite to replace it, or give another name")
    checkpoint = read_whole(asked.directory)
    with written_whole(asked.file) as written, open(written, "wb") as file:
        torch.save(checkpoint, file)
    sys.stdout.write(f"{asked.file}: step {checkpoint['global_step']}, {asked.file.stat().st_size:,} bytes\n")


def verify(args: Sequence[str]) -> None:
    """Read every byte of checkpoint directories.

    Raises:
        CheckpointError: one is not as it was written.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dualpipe verify", description="Read every byte of checkpoint directories, and check it."
    )
    parser.add_argument("directory", type=Path, nargs="+")
    for directory in parser.parse_args(args).directory:
        stored = open_stored(directory)
        size, manifest = stored.verify(), stored.manifest
        sys.stdout.write(
            f"{directory}: intact. Step {manifest.step}, {len(stored.index.entries):,} tensors, {size:,} bytes in "
            f"{len(manifest.files)} files, by {manifest.written_by}\n"
        )
