"""From a path to text: which files a corpus has, and their documents in pieces of bounded size.

    path            a file, a folder (searched for TEXT_SUFFIXES), a glob, or a list of these
    no path         the library sources of the running Python: about 12 MB of text that every machine has
    documents       a text file is one document; a line of .jsonl or .ndjson is one

Nothing is held whole: a file is decoded block by block. Nothing is left out silently either: bytes that
are not text stop everything with the file's name and the offset, and files of a folder whose suffix is
unknown are counted in the log.
"""

import codecs
import json
import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from hashlib import blake2b
from pathlib import Path

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["TEXT_SUFFIXES", "CorpusPath", "Piece", "Source", "find_sources", "read_pieces"]

CorpusPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

PROSE_SUFFIXES = ".txt .text .md .markdown .rst .org .tex .jsonl .ndjson"
CODE_SUFFIXES = ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .go .java .js .ts .kt .lua .pl .r .rb .rs .scala .sh .sql .swift"
TEXT_SUFFIXES = frozenset(f"{PROSE_SUFFIXES} {CODE_SUFFIXES}".split())
"""What is taken from a folder. A file that is named itself, or by a glob, is taken whatever its suffix."""

LINE_SUFFIXES = frozenset({".jsonl", ".ndjson"})
NOT_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
BLOCK = 1 << 20  # bytes decoded at once; a longer document comes in several pieces, cut after a line

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the corpus as it was when it was found. ``name`` does not depend on where the corpus lies."""

    path: Path
    name: str
    size: int
    modified_ns: int
    changed_ns: int  # content, name or rights; unlike the other, nobody can set it

    @property
    def holds_lines(self) -> bool:
        return self.path.suffix.lower() in LINE_SUFFIXES

    def unchanged(self) -> bool:
        return self.path.exists() and _source(self.path, self.name) == self


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one document. ``document`` is 64 bits that depend on the file's name and the line alone."""

    text: str
    document: int
    first: bool
    last: bool


def find_sources(path: CorpusPath | None) -> list[Source]:
    """The files of a corpus: entries in the order given, files of an entry sorted by name."""
    if path is None:
        return _standard_library()
    entries = [path] if isinstance(path, str | os.PathLike) else list(path)
    found: dict[Path, Source] = {}
    problems = []
    for entry in (os.path.expanduser(os.fspath(entry)) for entry in entries):
        sources = list(_files_of(entry))
        if not sources:
            problems.append(_why_nothing(entry))
        for source in sources:
            found.setdefault(source.path.resolve(), source)
    if not entries:
        problems.append("path=[] is empty: name a file, a folder or a glob, or give no path for Python's own sources")
    if problems:
        raise ConfigurationError.of("there is no corpus to read", problems)
    return list(found.values())


def _files_of(entry: str) -> Iterator[Source]:
    if Path(entry).is_file():
        yield _source(Path(entry), Path(entry).name)
    elif Path(entry).is_dir():
        yield from _files_below(Path(entry))
    elif has_magic(entry):
        base = Path(*(part for part in _parts_before_magic(entry)))
        for match in map(Path, sorted(glob(entry, recursive=True))):
            if match.is_file():
                yield _source(match, match.relative_to(base).as_posix())


def _parts_before_magic(pattern: str) -> Iterator[str]:
    for part in Path(pattern).parts[:-1]:
        if has_magic(part):
            return
        yield part


def _files_below(folder: Path) -> Iterator[Source]:
    left_out: Counter[str] = Counter()
    for name, path in _walk(folder):
        if path.suffix.lower() not in TEXT_SUFFIXES:
            left_out[path.suffix or "no suffix"] += 1
        elif not path.is_file():
            left_out["broken links"] += 1
        else:
            yield _source(path, name)
    if left_out:
        counts = ", ".join(f"{kind} {count}" for kind, count in left_out.most_common(8))
        _log.warning(
            f"{folder}: {left_out.total()} files are left out, because their suffix is not one of text ({counts}); "
            f"a glob takes files of any suffix, such as {folder / '**' / '*'}"
        )


def _walk(folder: Path, skip: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """(name, path) of all files, by name; hidden files and folders, such as .git, are no part of a corpus."""
    files, entered = [], {folder.resolve()}
    for parent, folders, names in os.walk(folder, followlinks=True):
        wanted = [name for name in folders if not name.startswith(".") and name not in skip]
        real = {name: Path(parent, name).resolve() for name in wanted}
        folders[:] = [name for name, path in real.items() if path not in entered]  # a link may lead back up
        entered.update(real.values())
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        files += [(path.relative_to(folder).as_posix(), path) for path in paths]
    return sorted(files)


def _standard_library() -> list[Source]:
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [_source(path, name) for name, path in _walk(folder, skip=NOT_THE_LIBRARY) if path.suffix == ".py"]
    if not sources:
        raise ConfigurationError(
            f"no path was given, and this Python has no library sources in {folder} to take instead: give a path"
        )
    return sources


def _source(path: Path, name: str) -> Source:
    stat = path.stat()
    return Source(path, name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _why_nothing(entry: str) -> str:
    if has_magic(entry):
        return f"path={entry!r} matches no file"
    if Path(entry).is_dir():
        return f"path={entry!r} is a folder without text files; taken are {' '.join(sorted(TEXT_SUFFIXES))}"
    return f"path={entry!r} does not exist"


def read_pieces(source: Source, *, text_key: str = "text") -> Iterator[Piece]:
    """The documents of a file. Documents without text are left out."""
    if source.holds_lines:
        yield from _lines(source, text_key)
        return
    document = _document_id(source.name, 0)
    previous = None
    for text in _blocks(source.path):
        if previous is not None:
            yield Piece(previous[1], document, first=previous[0], last=False)
        previous = (previous is None, text)
    if previous is not None:
        yield Piece(previous[1], document, first=previous[0], last=True)


def _blocks(path: Path) -> Iterator[str]:
    """A file in blocks of about BLOCK characters, cut after a line where there is one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, carried = 0, ""
    with path.open("rb") as file:
        block = file.read(BLOCK)
        while block:
            following = file.read(BLOCK)
            text = carried + _decode(decoder, block, path, offset, final=not following)
            if offset == 0:
                text = text.removeprefix("\ufeff")
            cut = text.rfind("\n") + 1 if following else 0
            cut = cut or len(text)
            if cut:
                yield text[:cut]
            offset, carried, block = offset + len(block), text[cut:], following


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, offset: int, *, final: bool) -> str:
    pending = len(decoder.getstate()[0])
    zero = block.find(0)
    try:
        text = decoder.decode(block, final)
    except UnicodeDecodeError as error:
        where = offset - pending + error.start
        if zero < 0 or where < offset + zero:
            raise _not_text(path, where, f"byte 0x{error.object[error.start]:02x} is no UTF-8") from None
    if zero >= 0:
        raise _not_text(path, offset + zero, "byte 0x00 does not occur in text")
    return text


def _not_text(path: Path, offset: int, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is not a UTF-8 text file: {what}, at offset {offset}; leave it out of the path, or convert it"
    )


def _lines(source: Source, key: str) -> Iterator[Piece]:
    with source.path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = _text_of(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, key, source.path, number)
                if text:
                    yield Piece(text, _document_id(source.name, number), first=True, last=True)


def _text_of(line: bytes, key: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # bytes that are not UTF-8 are one too
        raise ConfigurationError(f"{path}:{number} is not a line of JSON: {error}") from None
    if not isinstance(record, dict) or key not in record:
        has = f"an object with the keys {sorted(record)}" if isinstance(record, dict) else f"of type {_kind(record)}"
        raise ConfigurationError(f"{path}:{number} has no key {key!r}, it is {has}; choose the key by text_key=…")
    text = record[key]
    if not isinstance(text, str):
        raise ConfigurationError(f"{path}:{number}: {key!r} must be a string, it is of type {_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{path}:{number}: {key!r} is not valid text: {error}") from None
    return text


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _document_id(name: str, line: int) -> int:
    return int.from_bytes(blake2b(f"{name}\0{line}".encode("utf-8", "surrogateescape"), digest_size=8).digest())
