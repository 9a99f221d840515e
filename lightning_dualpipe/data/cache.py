"""A corpus as token ids on disk, tokenised once.

    <cache_dir>/<key>/tokens.bin       the ids of all documents in a row, uint16 (uint32 for large vocabularies)
                      documents.bin    for each document: where it ends, and its 64-bit identity
                      manifest.json    what it was made from, by which tokenizer, counts, a digest of the ids

The key is a digest of tokenizer and files, so a change of either makes a new cache. Of a file it takes
name, size, first and last 64 KiB, and both its times: archives and image layers give all their files one
time of modification, and a copy keeps it, so that it tells two corpora apart as little as their sizes do;
the time of the inode moves with every write and cannot be set back, but a mounted archive has none. Where
the corpus lies is no part of the key.

A cache is written in a folder of its own, flushed, and renamed into place: it is there whole or not at
all, whenever a writer is killed. Processes that start together wait for the one that holds the lock;
where a file system has no locks, each writes, the first rename wins, and all are right.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from lightning_dualpipe.data.corpus import Piece, Source, read_pieces
from lightning_dualpipe.data.tokenizers import Tokenizer
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["TokenCache", "tokenised"]

VERSION = 1
DOCUMENT = np.dtype([("end", "<i8"), ("id", "<u8")])
END = 64 << 10  # bytes at either end of a file that its key is made of
BATCH = 8 << 20  # characters given to the tokenizer at once, which may use a thread for each piece
REPORT_SECONDS = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCache:
    """A cache that is complete. Its arrays are memory maps, opened when they are asked for."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "TokenCache | None":
        """The cache in ``folder``; None where there is none, or one that lost bytes since it was written."""
        try:
            cache = cls(folder, json.loads((folder / "manifest.json").read_text()))
            whole = (
                cache.manifest["version"] == VERSION
                and cache._file("tokens").stat().st_size == cache.num_tokens * cache.dtype.itemsize
                and cache._file("documents").stat().st_size == cache.num_documents * DOCUMENT.itemsize
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cache if whole else None

    @property
    def num_tokens(self) -> int:
        return int(self.manifest["num_tokens"])

    @property
    def num_documents(self) -> int:
        return int(self.manifest["num_documents"])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.manifest["dtype"])

    @property
    def digest(self) -> str:
        """Equal for equal ids in equal documents, wherever and whenever they were tokenised."""
        return str(self.manifest["digest"])

    def tokens(self) -> npt.NDArray[np.unsignedinteger]:
        return self._map("tokens", self.dtype)

    def documents(self) -> npt.NDArray[np.void]:
        """Fields ``end`` (exclusive, in tokens) and ``id``."""
        return self._map("documents", DOCUMENT)

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if self._file(name).stat().st_size == 0:  # cannot be mapped
            return np.empty(0, dtype)
        return np.asarray(np.memmap(self._file(name), dtype=dtype, mode="r"))  # slices of the subclass are slow

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"


def tokenised(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    text_key: str = "text",
    report: Callable[[str], None] = _log.info,
) -> TokenCache:
    """The cache of these files; made now where there is none.

    Without ``cache_dir`` it is in the user's cache folder, or where that cannot be written in a temporary one.
    """
    key = _key(sources, tokenizer, text_key)
    for place in _places(cache_dir):
        if cache := TokenCache.open(place / key):
            return cache
    folder = _writable_place(cache_dir) / key
    with _one_writer(folder.with_suffix(".lock"), report) as locked:
        if cache := TokenCache.open(folder):
            return cache
        if locked:  # what lies here belongs to writers that were killed
            for left in folder.parent.glob(f".{key}.*"):
                shutil.rmtree(left)
        size = sum(source.size for source in sources)
        report(f"tokenising {len(sources):,} files, {size / 1e6:,.1f} MB, into {folder}")
        return _write(folder, sources, tokenizer, text_key, report)


def _key(sources: Sequence[Source], tokenizer: Tokenizer, text_key: str) -> str:
    files = [(source.name, source.size, source.modified_ns, source.changed_ns, _ends(source)) for source in sources]
    key = text_key if any(source.holds_lines for source in sources) else None
    return sha256(json.dumps([VERSION, tokenizer.fingerprint, key, files]).encode()).hexdigest()[:32]


def _ends(source: Source) -> str:
    """A digest of the first and the last bytes of a file."""
    with source.path.open("rb") as file:
        digest = blake2b(file.read(END), digest_size=16)
        file.seek(max(END, source.size - END))
        digest.update(file.read(END))
    return digest.hexdigest()


def _places(cache_dir: str | os.PathLike[str] | None) -> list[Path]:
    if cache_dir is not None:
        return [Path(os.path.expanduser(cache_dir))]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return [Path(home, "lightning-dualpipe"), Path(tempfile.gettempdir(), f"lightning-dualpipe-{user}")]


def _writable_place(cache_dir: str | os.PathLike[str] | None) -> Path:
    problems = []
    for place in _places(cache_dir):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            problems.append(f"{place}: {error.strerror or error}")
        else:
            if problems:
                _log.warning(
                    f"tokens are cached in {place}, give cache_dir=… to keep them; not writable: {problems[0]}"
                )
            return place
    raise ConfigurationError.of("the tokens of the corpus cannot be stored; give another cache_dir", problems)


def _write(
    folder: Path, sources: Sequence[Source], tokenizer: Tokenizer, text_key: str, report: Callable[[str], None]
) -> TokenCache:
    new = folder.with_name(f".{folder.name}.{uuid4().hex}")
    new.mkdir()
    try:
        counts = _write_tokens(new, _reported(sources, text_key, report), tokenizer)
        if changed := [str(source.path) for source in sources if not source.unchanged()]:
            raise ConfigurationError(f"these files changed while they were read; start again: {', '.join(changed[:5])}")
        _write_manifest(new, counts, sources, tokenizer, text_key)
        return _put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _put_in_place(new: Path, folder: Path) -> TokenCache:
    try:
        new.rename(folder)
    except OSError:
        if cache := TokenCache.open(folder):  # another writer was faster
            return cache
        if not folder.exists():
            raise
        shutil.rmtree(folder)  # a cache that lost bytes
        new.rename(folder)
    cache = TokenCache.open(folder)
    assert cache is not None, f"{folder} is complete as soon as it has its name"
    return cache


def _reported(sources: Sequence[Source], text_key: str, report: Callable[[str], None]) -> Iterator[Piece]:
    total, done, last = sum(source.size for source in sources), 0, time.monotonic()
    for source in sources:
        for piece in read_pieces(source, text_key=text_key):
            yield piece
            done += len(piece.text)
            if time.monotonic() - last > REPORT_SECONDS:
                last = time.monotonic()
                report(f"tokenised about {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, now in {source.path}")


def _write_tokens(folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    bos = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype)
    eos = np.array([tokenizer.eos], dtype)
    digest, num_tokens, num_documents = blake2b(digest_size=16), 0, 0
    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "documents.bin").open("wb") as documents_file:
        for batch in _batches(pieces):
            row: list[npt.NDArray[np.unsignedinteger]] = []
            documents: list[tuple[int, int]] = []
            for piece, ids in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
                row += [*[bos] * piece.first, ids.astype(dtype), *[eos] * piece.last]
                num_tokens += len(bos) * piece.first + len(ids) + len(eos) * piece.last
                if piece.last:
                    documents.append((num_tokens, piece.document))
            for file, data in ((tokens_file, np.concatenate(row)), (documents_file, np.array(documents, DOCUMENT))):
                digest.update(data.data)
                data.tofile(file)
            num_documents += len(documents)
        for file in (tokens_file, documents_file):
            _flush(file)
    counts = {"num_tokens": num_tokens, "num_documents": num_documents, "dtype": dtype.str}
    return counts | {"digest": digest.hexdigest()}


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """As many pieces together as make about BATCH characters, so that a tokenizer can use several threads."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_manifest(
    folder: Path, counts: dict[str, Any], sources: Sequence[Source], tokenizer: Tokenizer, text_key: str
) -> None:
    manifest = {
        "version": VERSION,
        **counts,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "text_key": text_key,
        "files": [{"name": source.name, "size": source.size, "modified_ns": source.modified_ns} for source in sources],
    }
    with (folder / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        _flush(file)


def _flush(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _one_writer(lock: Path, report: Callable[[str], None]) -> Iterator[bool]:
    """Holds the lock, which the kernel takes back from a process that dies; False where there are no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield False
        return
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that tokenises the same corpus")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True
