"""Named tensors in a directory of safetensors files, read and written one at a time.

    directory/
      config.json                           written last: without it there is no model
      model.safetensors.index.json          {"weight_map": {key: file}}; absent for a single file
      model-00001-of-00003.safetensors …    or model.safetensors
      .incomplete/                          shards of an export that has not ended

Reading maps one file at a time, and writing holds one shard, so the memory needed does not grow
with the model. What the tensors mean is left to ``convert``.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError

__all__ = [
    "ModelDirectory",
    "ShardWriter",
    "TensorReader",
    "begins_a_file",
    "file_names",
    "read_json",
    "size_in_bytes",
    "write_shard",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; every way in which there is none is a ``ConfigurationError``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(f"{path} does not exist; {_what_is(path.parent)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{path} is not readable JSON ({error}); copy it again from where it came") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds a JSON {type(content).__name__}, not an object of settings")
    return content


def _what_is(directory: Path) -> str:
    if not directory.exists():
        return f"{directory} does not exist: give a local directory, names on a hub are not looked up"
    if not directory.is_dir():
        return f"{directory} is a file: give the directory that holds config.json and the safetensors files"
    if (directory / ModelDirectory.WORKPLACE).exists():
        return f"an export to {directory} was interrupted: export again"
    names = sorted(path.name for path in directory.iterdir())
    return f"the directory holds {', '.join(names[:5]) + (', …' if len(names) > 5 else '') or 'nothing'}"


class TensorReader:
    """The tensors of a directory. Keeps at most two files open: weights, and a file with their scales."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = _files_by_key(directory)
        self._open: dict[str, tuple[ExitStack, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._open:
            self._close_oldest()

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def in_file_order(self, keys: Iterable[str]) -> list[str]:
        """``keys`` so that each file is opened once; all must be present."""
        return sorted(keys, key=lambda key: (self._files[key], key))

    def spec(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Name of the dtype as safetensors spells it (``BF16``, ``F8_E4M3``) and the shape, without reading."""
        header = self._slice(key)
        return header.get_dtype(), tuple(header.get_shape())

    def read(self, key: str) -> Tensor:
        """The tensor in the file's dtype. It may lie in the mapped file: copy it, do not keep it."""
        tensor: Tensor = self._tensors(key).get_tensor(key)
        return tensor

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        tensor: Tensor = self._slice(key)[start:stop]
        return tensor

    def _slice(self, key: str) -> Any:
        try:
            return self._tensors(key).get_slice(key)
        except _safetensors().SafetensorError as error:
            where = self._directory / self._files[key]
            raise ConfigurationError(f"{where} does not hold {key}, which {INDEX} says it does ({error})") from error

    def _tensors(self, key: str) -> Any:
        name = self._files[key]
        if name not in self._open:
            while len(self._open) > 1:
                self._close_oldest()
            stack = ExitStack()
            self._open[name] = (stack, stack.enter_context(_open(self._directory / name)))
        return self._open[name][1]

    def _close_oldest(self) -> None:
        stack, _ = self._open.pop(next(iter(self._open)))
        stack.close()


def _files_by_key(directory: Path) -> dict[str, str]:
    index, single = directory / INDEX, directory / SINGLE
    if index.exists() and single.exists():
        raise ConfigurationError(
            f"{directory} holds both {SINGLE} and {INDEX}, which may be two different models; remove one of them"
        )
    if single.exists():
        with _open(single) as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)
    if not index.exists():
        raise ConfigurationError(
            f"no weights: neither {SINGLE} nor {INDEX} is in {directory} ({_what_is(directory)}). "
            "Only safetensors files are read; convert .bin, .pt and .gguf files first"
        )
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ConfigurationError(f"{index} has no weight_map from tensor names to files; copy it again")
    problems = [
        f"{name} is named by {INDEX} but "
        + ("must lie in the directory itself" if Path(name).name != name else "absent")
        for name in sorted(set(files.values()))
        if Path(name).name != name or not (directory / name).is_file()
    ]
    if problems:
        raise ConfigurationError.of(f"{directory} is incomplete, copy the files again", problems)
    return files


def _open(path: Path) -> Any:
    library = _safetensors()
    try:
        return library.safe_open(path, framework="pt", device="cpu")
    except (library.SafetensorError, OSError) as error:
        cause = "a Git LFS pointer: run `git lfs pull`" if _is_pointer(path) else "truncated or damaged: copy it again"
        raise ConfigurationError(f"{path} is not a readable safetensors file ({error}); it is {cause}") from error


def _is_pointer(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(32).startswith(b"version https://git-lfs")
    return False


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError(
            "Hugging Face directories are read and written with safetensors, which is not installed; "
            "pip install safetensors. Training and Lightning checkpoints work without it"
        ) from error
    return safetensors


class ModelDirectory:
    """A directory that becomes a model when all its files are there, and not before.

    Until ``publish`` a model that was there stays whole; if that is never called, everything is as it was.

    Raises:
        ConfigurationError: it holds a model and ``overwrite`` is off, or cannot be written.
    """

    WORKPLACE = ".incomplete"

    def __init__(self, directory: Path, *, overwrite: bool = False) -> None:
        self.directory = directory
        self._workplace = directory / self.WORKPLACE
        _check_target(directory, overwrite=overwrite)
        self._made = not directory.exists()
        with _told_of(directory):
            if self._workplace.exists():
                shutil.rmtree(self._workplace)
            self._workplace.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._workplace, ignore_errors=True)
        if error is not None and self._made:
            with suppress(OSError):
                self.directory.rmdir()

    def shard(self, number: int) -> Path:
        """Where to write file ``number``, counted from 0, for ``publish`` to find it."""
        return self._workplace / f"{number}.safetensors"

    def publish(
        self, shards: Sequence[Iterable[str]], total_size: int, documents: Mapping[str, Mapping[str, Any] | str]
    ) -> None:
        """Put the files in place, ``config.json`` last.

        Args:
            shards: the tensors in each file.
            total_size: bytes of all tensors.
            documents: by name, texts or what JSON is made of.
        """
        names = file_names(len(shards))
        if len(names) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
            documents = {INDEX: index, **documents}
        with _told_of(self.directory):
            for name, content in documents.items():  # all that needs space, before anything is touched
                text = content if isinstance(content, str) else json.dumps(content, indent=2, allow_nan=False) + "\n"
                (self._workplace / name).write_text(text, encoding="utf-8")
                _sync(self._workplace / name)
            for name in [CONFIG, INDEX, *(path.name for path in _model_files(self.directory))]:
                (self.directory / name).unlink(missing_ok=True)
            for number, name in enumerate(names):
                os.replace(self.shard(number), self.directory / name)
            for name in sorted(documents, key=lambda name: name == CONFIG):
                os.replace(self._workplace / name, self.directory / name)


class ShardWriter:
    """Collects tensors into files of at most ``max_shard_size`` bytes, in the order in which they come.

    Memory: the tensors of one shard.
    """

    def __init__(self, directory: Path, max_shard_size: int, *, overwrite: bool = False) -> None:
        self._target = ModelDirectory(directory, overwrite=overwrite)
        self._max_shard_size = max_shard_size
        self._waiting: dict[str, Tensor] = {}
        self._waiting_size = 0
        self._shards: list[list[str]] = []
        self._total_size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._target.__exit__(kind, error, at)

    def add(self, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Take a copy of ``tensor`` in ``dtype``."""
        size = tensor.numel() * dtype.itemsize
        if begins_a_file(self._waiting_size, size, self._max_shard_size):
            self._write_shard()
        self._waiting[key] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        self._waiting_size += size
        self._total_size += size

    def publish(self, documents: Mapping[str, Mapping[str, Any] | str]) -> None:
        self._write_shard()
        self._target.publish(self._shards, self._total_size, documents)

    def _write_shard(self) -> None:
        if self._waiting:
            write_shard(self._waiting, self._target.shard(len(self._shards)))
            self._shards.append(list(self._waiting))
            self._waiting.clear()
            self._waiting_size = 0


def write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """One file, on the disk when this returns.

    Raises:
        ConfigurationError: the disk is full, or the like.
    """
    with _told_of(path.parent.parent):
        path.touch()
        mode = path.stat().st_mode  # the library (0.8) makes files that other users, such as a server's, cannot read
        _safetensors().torch.save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
        _sync(path)


@contextmanager
def _told_of(directory: Path) -> Iterator[None]:
    library = _safetensors()
    try:
        yield
    except (OSError, library.SafetensorError) as error:
        raise ConfigurationError(
            f"{directory} cannot be written: {error}; free space, or choose another directory"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begins_a_file(filled: int, size: int, max_shard_size: int) -> bool:
    """Whether a tensor of ``size`` bytes goes to another file than the ``filled`` bytes before it."""
    return filled > 0 and filled + size > max_shard_size


def file_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _check_target(directory: Path, *, overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigurationError(f"{directory} is a file, an export needs a directory; choose another name")
    there = [directory / CONFIG, *_model_files(directory)]
    if not overwrite and any(path.exists() for path in there):
        raise ConfigurationError(
            f"{directory} already holds a model; choose another directory, or replace it by --overwrite "
            "(overwrite=True)"
        )


def _model_files(directory: Path) -> list[Path]:
    names = [path for path in directory.glob("model*.safetensors") if _SHARD.fullmatch(path.name)]
    return [*names, *directory.glob(INDEX)]


def size_in_bytes(size: int | str) -> int:
    """``"5GB"`` is 5e9 bytes, ``"5GiB"`` 5 * 2**30; a plain number counts bytes."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in units or float(match[1]) <= 0:
        raise ConfigurationError(
            f"--shard-size {size} (max_shard_size={size!r}) is no size; give bytes as a number, or text such as '5GB' "
            "or '512MiB'"
        )
    return int(float(match[1]) * units[match[2].upper()])
