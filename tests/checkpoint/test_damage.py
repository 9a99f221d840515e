"""A checkpoint directory that is not as it was written is refused, with the name of the file; no code in it runs."""

import io
import json
import pickle
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_dualpipe.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from lightning_dualpipe.checkpoint.stored import open_stored, read, read_whole
from lightning_dualpipe.errors import CheckpointError
from tests.checkpoint.damage import SHAPES, copy, files_of, positions, tensors, write
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks: ``3.ckpt`` and ``4.ckpt``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (3, 4):
        run_ranks(2, write, str(folder / f"{step}.ckpt"), step, 2)
    return folder


def assert_is(step: int, directory: Path) -> None:
    found = read_whole(directory)
    assert found["global_step"] == step
    for name, tensor in {**tensors(step), "head": tensors(step)["embed"]}.items():
        assert found["state_dict"][name].dtype == tensor.dtype
        assert torch.equal(found["state_dict"][name], tensor), name


def test_what_two_ranks_wrote_is_whole(folder: Path) -> None:
    assert_is(3, folder / "3.ckpt")
    assert open_stored(folder / "3.ckpt").verify() > sum(t.nbytes for t in tensors(3).values())
    assert {path.name for path in folder.iterdir()} == {"3.ckpt", "4.ckpt"}, "nothing is left of the writing"


def test_tensor_files_are_safetensors(folder: Path) -> None:
    found = load_file(folder / "4.ckpt/rank-00001.safetensors")
    assert torch.equal(found["state_dict/bias[2:4]"], tensors(4)["bias"][2:])


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_twenty_flipped_bits_and_twenty_cuts_are_refused(how: str, folder: Path, tmp_path: Path) -> None:
    good = folder / "4.ckpt"
    for number, (name, position) in enumerate(positions(good, 20, seed=7)):
        bad = copy(good, tmp_path / f"{number}.ckpt")
        content = bytearray((bad / name).read_bytes())
        if how == "bit":
            content[position] ^= 1 << number % 8
        else:
            del content[position:]
        (bad / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_whole(bad)
        with pytest.raises(CheckpointError, match=name):
            open_stored(bad).verify()
    assert_is(3, folder / "3.ckpt")


def test_every_bit_of_the_small_files_counts(folder: Path, tmp_path: Path) -> None:
    bad = copy(folder / "4.ckpt", tmp_path / "bad.ckpt")
    content = (bad / MANIFEST).read_bytes()
    for position in range(len(content)):
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << position % 8
        (bad / MANIFEST).write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=MANIFEST):
            open_stored(bad)


@pytest.mark.parametrize("name", ["index.json", "state.pt", "rank-00000.safetensors", "rank-00001.safetensors"])
def test_a_file_of_another_step_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    bad = copy(folder / "4.ckpt", tmp_path / "bad.ckpt")
    shutil.copy(folder / "3.ckpt" / name, bad / name)
    with pytest.raises(CheckpointError, match=name) as refused:
        read_whole(bad)
    if name.startswith("rank"):
        assert "belongs to another checkpoint" in str(refused.value)


@pytest.mark.parametrize("name", [MANIFEST, "index.json", "state.pt", "rank-00001.safetensors"])
def test_a_missing_file_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    bad = copy(folder / "4.ckpt", tmp_path / "bad.ckpt")
    (bad / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_stored(bad)


def load(rank: int, directory: str) -> str:
    """One rank reads what it holds, the other half elsewhere; what each is told."""
    stored = open_stored(directory)
    tensor = stored.checkpoint()["state_dict"]["embed"].reshape(-1)
    mine = {"embed": tensor[rank * 26 : (rank + 1) * 26]}
    try:
        return str(torch.equal(read(mine, stored, torch.distributed.group.WORLD)["embed"].view(-1),
                               tensors(4)["embed"].view(-1)[rank * 26 : (rank + 1) * 26]))  # fmt: skip
    except CheckpointError as error:
        return str(error)


def test_all_ranks_hear_of_a_block_that_one_of_them_found_damaged(folder: Path, tmp_path: Path) -> None:
    assert run_ranks(2, load, str(folder / "4.ckpt")) == ["True", "True"]
    bad = copy(folder / "4.ckpt", tmp_path / "bad.ckpt")
    name = "rank-00001.safetensors"
    entry = next(e for key, e in open_stored(bad).index.entries.items() if key.name == "embed")
    content = bytearray((bad / name).read_bytes())
    content[entry.blocks[-1].offset] ^= 1
    (bad / name).write_bytes(content)
    one, other = run_ranks(2, load, str(bad))
    assert one == other and name in one and "elements 26 to 52 of state_dict/embed" in one


# ---- somebody who knows the format -------------------------------------------------------------


class Evil:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def forge(directory: Path, name: str, content: bytes) -> None:
    """Replace a file, and everything that says it was replaced."""
    manifest = Manifest.read(directory)
    (directory / name).write_bytes(content)
    files = {**manifest.files, name: FileRecord.of(content)}
    Manifest(manifest.save, manifest.step, manifest.written_by, files).write(directory)


def evil_state(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {}, "global_step": Evil(mark)}, buffer)
    return buffer.getvalue()


def test_a_malicious_checkpoint_runs_nothing(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "it would"
    mark.unlink()
    for number, (name, content) in enumerate(
        [
            ("state.pt", evil_state(mark)),
            ("state.pt", pickle.dumps(Evil(mark), protocol=2)),
            ("index.json", pickle.dumps(Evil(mark))),
            ("rank-00000.safetensors", pickle.dumps(Evil(mark))),
        ]
    ):
        bad = copy(folder / "4.ckpt", tmp_path / f"{number}.ckpt")
        forge(bad, name, content)
        with pytest.raises(CheckpointError):
            read_whole(bad)
        assert not mark.exists(), name
    extra = copy(folder / "4.ckpt", tmp_path / "extra.ckpt")
    forge(extra, ".metadata", pickle.dumps(Evil(mark)))
    assert_is(4, extra)  # nobody asks for that file
    bad = tmp_path / "dcp.ckpt"
    bad.mkdir()
    (bad / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match="is a pickle that may run any code"):
        read_whole(bad)
    assert not mark.exists()


FORGED = {
    "a file elsewhere": lambda index: index["files"].__setitem__(0, "../../3.ckpt/rank-00000.safetensors"),
    "a tensor without some elements": lambda index: index["tensors"][0]["blocks"].pop(),
    "a larger shape": lambda index: index["tensors"][0].__setitem__("shape", [10**9, 10**9]),
    "elements twice": lambda index: index["tensors"][0]["blocks"].append(index["tensors"][0]["blocks"][0]),
    "another offset": lambda index: index["tensors"][0]["blocks"][0].__setitem__(3, 10**6),
    "an unknown dtype": lambda index: index["tensors"][0].__setitem__("dtype", "F4"),
    "no tensors": lambda index: index.pop("tensors"),
    "text for a number": lambda index: index["tensors"][0]["blocks"][0].__setitem__(0, "0"),
}


@pytest.mark.parametrize("how", FORGED)
def test_an_index_that_does_not_describe_the_files_is_refused(how: str, folder: Path, tmp_path: Path) -> None:
    bad = copy(folder / "4.ckpt", tmp_path / "bad.ckpt")
    index = json.loads((bad / "index.json").read_text())
    FORGED[how](index)
    forge(bad, "index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError):
        read_whole(bad)


def test_a_later_format_and_another_one_are_refused(folder: Path, tmp_path: Path) -> None:
    for words, change in (("reads up to 1; upgrade", ("version", 2)), ("which is not", ("format", "other"))):
        bad = copy(folder / "4.ckpt", tmp_path / f"{change[0]}.ckpt")
        found = json.loads((bad / MANIFEST).read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[0])
        body = json.dumps({**found, **dict([change])}).encode()
        (bad / MANIFEST).write_bytes(body + b"\n" + sha256(body).hexdigest().encode() + b"\n")
        with pytest.raises(CheckpointError, match=words):
            open_stored(bad)


def test_what_is_no_checkpoint_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json, which is written last \(it is empty\)"):
        open_stored(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"it holds notes\.txt"):
        open_stored(tmp_path)


def test_reading_some_rows_reads_their_blocks_only(folder: Path, tmp_path: Path) -> None:
    """The first half of a tensor loads although the second is damaged: what is not read is not checked."""
    bad = copy(folder / "4.ckpt", tmp_path / "bad.ckpt")
    stored = open_stored(bad)
    experts = stored.checkpoint()["state_dict"]["experts"]
    (block,) = (block for block in experts.entry.blocks if block.file == "rank-00001.safetensors")
    content = bytearray((bad / block.file).read_bytes())
    content[block.offset] ^= 1
    (bad / block.file).write_bytes(content)
    assert torch.equal(experts[:2].read(), tensors(4)["experts"][:2])
    assert experts[1:].shape == (3, *SHAPES["experts"][1:])
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is damaged"):
        experts[1:].read()
    assert files_of(folder / "4.ckpt")[block.file] != bytes(content)
