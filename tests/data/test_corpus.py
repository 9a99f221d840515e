import json
import logging
from pathlib import Path

import pytest

from lightning_dualpipe.data import corpus
from lightning_dualpipe.data.corpus import Source, find_sources, read_pieces
from lightning_dualpipe.errors import ConfigurationError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names(sources: list[Source]) -> list[str]:
    return [source.name for source in sources]


def documents(path: Path, **options: str) -> list[str]:
    """All documents of a path, pieces joined."""
    texts: list[str] = []
    for source in find_sources(path):
        for piece in read_pieces(source, **options):
            texts += [""] * piece.first
            texts[-1] += piece.text
    return texts


def test_a_folder_is_searched_for_text_and_what_is_left_out_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.txt", "a.md", "deep/er/c.jsonl", "d.PY", "x.png", "y", ".git/config.txt", ".hidden.txt"):
        write(tmp_path / name, "text")
    with caplog.at_level(logging.WARNING):
        found = find_sources(tmp_path)
    assert names(found) == ["a.md", "b.txt", "d.PY", "deep/er/c.jsonl"]
    assert "2 files" in caplog.text and ".png 1" in caplog.text and "no suffix 1" in caplog.text


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.txt", "a")
    corpus_folder = tmp_path / "corpus"
    corpus_folder.mkdir()
    (corpus_folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(corpus_folder)
    assert names(find_sources(corpus_folder)) == ["linked/a.txt"]


def test_a_named_file_or_a_glob_takes_any_suffix(tmp_path: Path) -> None:
    for name in ("one/a.log", "one/b.log", "two/a.log"):
        write(tmp_path / name, "text")
    assert names(find_sources(tmp_path / "one" / "a.log")) == ["a.log"]
    assert names(find_sources(str(tmp_path / "*" / "*.log"))) == ["one/a.log", "one/b.log", "two/a.log"]
    assert names(find_sources(f"{tmp_path}/**/a.log")) == ["one/a.log", "two/a.log"]


def test_a_list_keeps_its_order_and_takes_each_file_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "z.txt", "z"), write(tmp_path / "a.txt", "a")
    assert names(find_sources([str(first), tmp_path])) == ["z.txt", "a.txt"]
    assert names(find_sources([second, first, second])) == ["a.txt", "z.txt"]


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path: Path) -> None:
    for place in ("here", "there/deep"):
        write(tmp_path / place / "sub" / "a.txt", "a")
    assert names(find_sources(tmp_path / "here")) == names(find_sources(tmp_path / "there" / "deep"))


@pytest.mark.parametrize(
    ("path", "why"),
    [("missing.txt", "does not exist"), ("*.none", "matches no file"), ("empty", "folder without text files")],
)
def test_a_path_without_files_says_why(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=why):
        find_sources(str(tmp_path / path))


def test_all_bad_paths_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)one\.txt.*two\.txt"):
        find_sources([tmp_path / "one.txt", tmp_path / "two.txt"])
    with pytest.raises(ConfigurationError, match="is empty"):
        find_sources([])


def test_without_a_path_the_standard_library_is_read() -> None:
    sources = find_sources(None)
    found = names(sources)
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py"} <= set(found)
    assert found == sorted(found)
    assert not any(part in ("test", "tests", "site-packages") for name in found for part in name.split("/"))
    assert 5e6 < sum(source.size for source in sources) < 50e6


def test_a_text_file_is_one_document_and_a_line_of_jsonl_is_one(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "first\nsecond\r\n")
    lines = [json.dumps({"text": "ä\n€"}), "", json.dumps({"text": "", "other": 1}), json.dumps({"text": "last"})]
    write(tmp_path / "b.jsonl", "\n".join(lines))
    write(tmp_path / "c.txt", "")
    assert documents(tmp_path) == ["first\nsecond\r\n", "ä\n€", "last"]
    assert documents(tmp_path / "a.txt", text_key="other") == ["first\nsecond\r\n"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "hello"}\n')
    assert documents(tmp_path) == ["hello", "hello"]
    assert documents(write(tmp_path / "c.txt", b"\xef\xbb\xbf")) == []


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 64, 1000])
def test_a_long_file_comes_in_pieces_that_join_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    text = "a line\n\nänother €-line 🙂\n" * 5 + "a line without end " * 4
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(corpus, "BLOCK", block)
    pieces = list(read_pieces(find_sources(path)[0]))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len({piece.document for piece in pieces}) == 1
    assert max(len(piece.text) for piece in pieces) <= 2 * block or block == 1000


def test_pieces_end_with_a_line_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 10)
    path = write(tmp_path / "a.txt", "12345\n789\nabcdef\nxyz")
    assert [piece.text for piece in read_pieces(find_sources(path)[0])] == ["12345\n789\n", "abcdef\nxyz"]


@pytest.mark.parametrize("block", [2, 3, 7, 4096])
@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"good text \xff bad", 10, "0xff"),
        (b"ends within a character \xe2\x82", 24, "0xe2"),
        ("€€".encode() + b"\xe2\x82" + b"rest", 6, "0xe2"),
        (b"a zero\0 byte", 6, "0x00"),
        (b"zero \0 before \xff", 5, "0x00"),
        (b"\x89PNG\r\n\x1a\n\0\0", 0, "0x89"),
    ],
)
def test_a_binary_file_is_named_with_the_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, content: bytes, offset: int, byte: str
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", block)
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(ConfigurationError, match=rf"a\.txt .*{byte}.*at offset {offset};"):
        list(read_pieces(find_sources(path)[0]))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"not json", "is not a line of JSON"),
        (b'{"text": "\xff"}', "is not a line of JSON"),
        (b'{"body": "x", "id": 1}', r"no key 'text'.*\['body', 'id'\]"),
        (b'["text"]', "of type list"),
        (b'{"text": null}', "must be a string.*null"),
        (b'{"text": 3}', "must be a string.*int"),
        (b'{"text": "\\ud800"}', "not valid text"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, line: bytes, why: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(ConfigurationError, match=rf"a\.jsonl:3.*{why}"):
        list(read_pieces(find_sources(path)[0]))


def test_the_key_of_the_text_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson", '{"body": "hello", "text": 1}\n')
    assert documents(path, text_key="body") == ["hello"]


def test_documents_are_told_apart_by_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": "x"}\n')
    write(tmp_path / "b.txt", "x")
    identities = [piece.document for source in find_sources(tmp_path) for piece in read_pieces(source)]
    assert len(set(identities)) == 3
    assert all(0 <= identity < 2**64 for identity in identities)
