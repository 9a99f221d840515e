import logging
import multiprocessing
import os
import shutil
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_dualpipe.data import cache as cache_module
from lightning_dualpipe.data import corpus
from lightning_dualpipe.data.cache import TokenCache, tokenised
from lightning_dualpipe.data.corpus import find_sources
from lightning_dualpipe.data.tokenizers import BYTE_BOS, BYTE_EOS, ByteTokenizer
from lightning_dualpipe.errors import ConfigurationError
from tests.ranks import run_ranks

PROCESSES = multiprocessing.get_context("forkserver")  # the server of tests.ranks, which has imported torch already
TEXTS = {"a.txt": "first", "b.txt": "", "c.txt": "third, with €", "d.jsonl": '{"text": "x"}\n{"text": "yz"}\n'}
DOCUMENTS = ["first", "third, with €", "x", "yz"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def make(folder: Path, tmp_path: Path, tokenizer: Any = None, **options: Any) -> TokenCache:
    return tokenised(find_sources(folder), tokenizer or ByteTokenizer(), tmp_path / "cache", **options)


def left_over(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_each_document_is_bos_its_tokens_and_eos(folder: Path, tmp_path: Path) -> None:
    cache = make(folder, tmp_path)
    expected = [[BYTE_BOS, *text.encode(), BYTE_EOS] for text in DOCUMENTS]
    assert cache.tokens().tolist() == [id for ids in expected for id in ids]
    assert cache.documents()["end"].tolist() == np.cumsum([len(ids) for ids in expected]).tolist()
    assert (cache.num_tokens, cache.num_documents) == (sum(map(len, expected)), 4)
    assert cache.dtype == np.uint16
    assert left_over(tmp_path) == []


def test_it_is_made_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(folder, tmp_path)
    monkeypatch.setattr(cache_module, "read_pieces", None)
    assert make(folder, tmp_path) == made


def test_a_change_of_the_files_makes_another(folder: Path, tmp_path: Path) -> None:
    first = make(folder, tmp_path)
    (folder / "a.txt").write_text("fIrst")
    os.utime(folder / "a.txt", ns=(1, 1))
    changed = make(folder, tmp_path)
    (folder / "e.txt").write_text("new")
    grown = make(folder, tmp_path)
    assert len({cache.folder for cache in (first, changed, grown)}) == 3
    assert len({cache.digest for cache in (first, changed, grown)}) == 3
    assert TokenCache.open(first.folder) == first  # a run that still reads it is not disturbed


def rewritten(file: Path, text: str) -> None:
    """Other bytes in the same file, of the same size, with the time of modification put back."""
    before = file.stat()
    assert len(text) == before.st_size
    file.write_text(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_two_corpora_with_equal_names_sizes_and_times_have_a_cache_each(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))  # with its times
    rewritten(other / "a.txt", "fIrst")
    first, second = make(folder, tmp_path), make(other, tmp_path)
    assert first.digest != second.digest
    assert second.tokens()[:7].tolist() == [BYTE_BOS, *b"fIrst", BYTE_EOS]


def test_the_ends_of_a_file_tell_corpora_apart_where_all_times_are_those_of_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "END", 8)
    file = tmp_path / "a.txt"

    def keys() -> str:
        (source,) = find_sources(file)
        return cache_module._key([replace(source, modified_ns=0, changed_ns=0)], ByteTokenizer(), "text")

    found = set()
    for text in ("0123456789abcdefghij", "x123456789abcdefghij", "0123456789abcdefghix"):
        file.write_text(text)
        found.add(keys())
    assert len(found) == 3


def test_an_edit_in_the_middle_that_keeps_size_and_time_makes_another(tmp_path: Path) -> None:
    """Found by the time of the inode, whose clock ticks every few milliseconds."""
    file = tmp_path / "a.txt"
    text = "a line\n" * 50_000
    file.write_text(text)
    before = make(file, tmp_path)
    while time.time_ns() < file.stat().st_ctime_ns + 50_000_000:
        time.sleep(0.01)
    rewritten(file, text[:175_000] + "A" + text[175_001:])
    assert make(file, tmp_path).digest != before.digest


def test_equal_tokens_have_equal_digests_wherever_they_come_from(folder: Path, tmp_path: Path) -> None:
    first = make(folder, tmp_path)
    os.utime(folder / "a.txt", ns=(1, 1))
    touched = make(folder, tmp_path)
    assert touched.folder != first.folder and touched.digest == first.digest


class ShiftedBytes(ByteTokenizer):
    """Ids above 65535."""

    vocab_size = 100_256
    fingerprint = "shifted bytes"
    bos = None  # type: ignore[assignment]

    def encode(self, texts: Sequence[str]) -> list[Any]:
        return [ids.astype(np.uint32) + 100_000 for ids in super().encode(texts)]


def test_a_large_vocabulary_is_stored_wider_and_bos_may_be_missing(folder: Path, tmp_path: Path) -> None:
    cache = make(folder, tmp_path, ShiftedBytes())
    assert cache.dtype == np.uint32
    assert cache.tokens()[:6].tolist() == [100_000 + byte for byte in b"first"] + [BYTE_EOS]
    assert cache.folder != make(folder, tmp_path).folder


def test_the_key_of_the_text_matters_where_there_are_lines(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"d\.jsonl:1.*no key 'body'"):
        make(folder, tmp_path, text_key="body")
    assert left_over(tmp_path) == []
    (folder / "d.jsonl").unlink()
    assert make(folder, tmp_path, text_key="body") == make(folder, tmp_path)


@pytest.mark.parametrize("damage", ["shorter tokens", "longer documents", "no manifest", "bad manifest", "old version"])
def test_a_damaged_cache_is_made_again(folder: Path, tmp_path: Path, damage: str) -> None:
    cache = make(folder, tmp_path)
    tokens, manifest = cache.tokens().tolist(), cache.folder / "manifest.json"
    if damage == "shorter tokens":
        os.truncate(cache.folder / "tokens.bin", 8)
    elif damage == "longer documents":
        with (cache.folder / "documents.bin").open("ab") as file:
            file.write(b"x")
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 0'))
    assert TokenCache.open(cache.folder) is None
    assert make(folder, tmp_path).tokens().tolist() == tokens


class SlowBytes(ByteTokenizer):
    """Shows by a file that it has begun, then takes its time."""

    def __init__(self, begun: Path, seconds: float) -> None:
        self.begun, self.seconds = begun, seconds

    def encode(self, texts: Sequence[str]) -> list[Any]:
        self.begun.touch()
        time.sleep(self.seconds)
        return super().encode(texts)


def make_slowly(folder: Path, tmp_path: Path, seconds: float) -> tuple[list[int], int]:
    """In another process: the tokens, and how many times it tokenised."""
    reports: list[str] = []
    cache = make(folder, tmp_path, SlowBytes(tmp_path / "begun", seconds), report=reports.append)
    return cache.tokens().tolist(), sum("tokenising" in report for report in reports)


def make_slowly_on_rank(rank: int, folder: Path, tmp_path: Path) -> tuple[list[int], int]:
    return make_slowly(folder, tmp_path, seconds=1)


def test_a_killed_writer_leaves_nothing_that_counts(folder: Path, tmp_path: Path) -> None:
    writer = PROCESSES.Process(target=make_slowly, args=(folder, tmp_path, 60))
    writer.start()
    while not (tmp_path / "begun").exists():
        assert writer.is_alive()
        time.sleep(0.02)
    writer.kill()
    writer.join()
    assert len(left_over(tmp_path)) == 1
    assert make(folder, tmp_path).num_documents == 4
    assert left_over(tmp_path) == []


def test_processes_that_start_together_tokenise_once_and_agree(folder: Path, tmp_path: Path) -> None:
    got = run_ranks(4, make_slowly_on_rank, folder, tmp_path)
    assert all(tokens == got[0][0] for tokens, _ in got)
    assert sum(count for _, count in got) == 1
    assert left_over(tmp_path) == []


def test_without_locks_the_first_rename_wins(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    faster: list[TokenCache] = []

    class Overtaken(ByteTokenizer):
        def encode(self, texts: Sequence[str]) -> list[Any]:
            if not faster:
                faster.append(make(folder, tmp_path, ByteTokenizer()))
            return super().encode(texts)

    assert make(folder, tmp_path, Overtaken()) == faster[0]
    assert left_over(tmp_path) == []
    os.truncate(faster[0].folder / "tokens.bin", 2)  # and a damaged one is replaced
    assert make(folder, tmp_path).num_documents == 4


def test_files_that_change_while_they_are_read_are_an_error(folder: Path, tmp_path: Path) -> None:
    class Meddling(ByteTokenizer):
        def encode(self, texts: Sequence[str]) -> list[Any]:
            (folder / "a.txt").write_text("longer than before")
            return super().encode(texts)

    with pytest.raises(ConfigurationError, match=r"changed while they were read.*a\.txt"):
        make(folder, tmp_path, Meddling())
    assert left_over(tmp_path) == []


def test_memory_is_bounded_however_large_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 1 << 15)
    monkeypatch.setattr(cache_module, "BATCH", 1 << 15)
    (tmp_path / "large.txt").write_text("a line of a large file\n" * 400_000)
    sources = find_sources(tmp_path / "large.txt")
    tracemalloc.start()
    cache = tokenised(sources, ByteTokenizer(), tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cache.num_tokens == sources[0].size + 2 > 9_000_000
    assert peak < 2_000_000


def test_an_empty_corpus_is_a_cache_without_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    cache = tokenised(find_sources(tmp_path / "a.txt"), ByteTokenizer(), tmp_path / "cache")
    assert (cache.num_tokens, len(cache.tokens()), len(cache.documents())) == (0, 0, 0)


def test_the_users_cache_folder_is_the_default(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache = tokenised(find_sources(folder), ByteTokenizer())
    assert cache.folder.parent == tmp_path / "home" / "lightning-dualpipe"


def test_a_folder_that_cannot_be_written_is_replaced_with_a_warning_or_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    with caplog.at_level(logging.WARNING):
        cache = tokenised(find_sources(folder), ByteTokenizer())
    assert cache.folder.is_relative_to(tmp_path / "temporary")
    assert "cache_dir=" in caplog.text and "Not a directory" in caplog.text
    with pytest.raises(ConfigurationError, match=r"give another cache_dir.*\n.*Not a directory"):
        tokenised(find_sources(folder), ByteTokenizer(), tmp_path / "file" / "cache")


def test_a_finished_cache_needs_no_permission_to_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(folder, tmp_path)
    monkeypatch.setattr(cache_module, "_writable_place", None)
    assert make(folder, tmp_path) == made
