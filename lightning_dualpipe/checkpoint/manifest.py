"""What a checkpoint directory consists of: its files, how long they are, and what their bytes hash to.

    step=1000.ckpt/
        manifest.json       this: written last, so a directory without one is no checkpoint
        index.json          which elements of which tensor lie where          checkpoint.index
        state.pt            everything that is no large tensor                read with weights_only alone
        rank-00000.safetensors ...                                            what each rank had

Every byte of the directory is covered: the manifest by its own last line, whole files and the headers of
tensor files by the manifest, the rest of tensor files block by block by the index.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_dualpipe.errors import CheckpointError

__all__ = ["INDEX", "MANIFEST", "REMEDY", "STATE", "FileRecord", "Manifest", "write_durably"]

MANIFEST, INDEX, STATE = "manifest.json", "index.json", "state.pt"
_FORMAT, _VERSION = "lightning-dualpipe checkpoint", 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """``sha256`` is that of the first ``hashed`` of all ``size`` bytes."""

    size: int
    hashed: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "FileRecord":
        return cls(len(content), len(content), sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    Args:
        save: of this act of saving, unique; tensor files carry it too.
        step: optimizer steps of the run.
        written_by: the layout of the ranks, for people.
        files: by name, all but the manifest.
    """

    save: str
    step: int
    written_by: str
    files: Mapping[str, FileRecord]

    def write(self, directory: Path) -> None:
        body = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1).encode()
        write_durably(directory / MANIFEST, body + b"\n" + sha256(body).hexdigest().encode() + b"\n")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """
        Raises:
            CheckpointError: there is none, it is damaged, or of a later version than this one knows.
        """
        path = directory / MANIFEST
        try:
            body, _, rest = path.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")
            whole = len(body) + len(rest) + 2 == path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(_not_one(directory)) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not whole or sha256(body).hexdigest().encode() != rest:
            raise CheckpointError(f"{path} is damaged: its last line is not the SHA-256 of the rest. {REMEDY}")
        try:
            return cls._parsed(json.loads(body), path)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not what it says: {error!r}. {REMEDY}") from None

    @classmethod
    def _parsed(cls, found: Mapping[str, Any], path: Path) -> "Manifest":
        if found.get("format") != _FORMAT:
            raise CheckpointError(f"{path} says format {found.get('format')!r}, which is not {_FORMAT!r}")
        if found["version"] > _VERSION:
            raise CheckpointError(
                f"{path} is of version {found['version']} of the format, and this lightning-dualpipe reads up to "
                f"{_VERSION}; upgrade it, or make one file with the version that wrote this: "
                "lightning-dualpipe consolidate DIRECTORY FILE"
            )
        files = {name: FileRecord(**record) for name, record in found["files"].items()}
        for name in files:
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise CheckpointError(f"{path} lists the file {name!r}, which is not a name in this directory")
        return cls(found["save"], found["step"], found["written_by"], files)

    def check_lengths(self, directory: Path) -> None:
        """
        Raises:
            CheckpointError: a file is missing, or was cut.
        """
        for name, record in self.files.items():
            path = directory / name
            try:
                length = path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path} is missing ({error.strerror}). {REMEDY}") from None
            if length != record.size:
                raise CheckpointError(f"{path} has {length} bytes, and was written with {record.size}. {REMEDY}")

    def read_whole(self, directory: Path, name: str) -> bytes:
        """A file whose every byte this manifest covers.

        Raises:
            CheckpointError: it is not the one that was written.
        """
        path = directory / name
        if name not in self.files:
            raise CheckpointError(f"{directory / MANIFEST} lists no {name}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if FileRecord.of(content) != self.files[name]:
            raise CheckpointError(f"{path} is damaged, or of another checkpoint: {_SHA}. {REMEDY}")
        return content


REMEDY = "Nothing was loaded; go on from another checkpoint"
_SHA = "its SHA-256 is not the one in the manifest"


def write_durably(path: Path, content: bytes) -> None:
    """On the disk when this returns, and not only on its way there."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _not_one(directory: Path) -> str:
    if not directory.exists():
        return f"{directory} is no checkpoint: there is nothing of that name. {REMEDY}"
    if not directory.is_dir():
        return f"{directory} is a file, and this is for checkpoint directories, which all ranks write. {REMEDY}"
    inside = sorted(path.name for path in directory.iterdir())[:6]
    if ".metadata" in inside:
        return (
            f"{directory} is a checkpoint of torch.distributed.checkpoint, whose metadata is a pickle that may run any "
            "code; make one file of it with the tool that wrote it, and pass that"
        )
    holds = f"it holds {', '.join(inside)}" if inside else "it is empty"
    return f"{directory} is no checkpoint: it has no {MANIFEST}, which is written last ({holds}). {REMEDY}"
