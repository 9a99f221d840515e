"""A run that is started again goes on from the newest checkpoint that is intact."""

import shutil
from pathlib import Path

import pytest
import torch

from lightning_dualpipe import CheckpointError, newest_checkpoint
from tests.checkpoint.damage import copy, positions, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newest")
    for version, step in (("version_0", 9), ("version_1", 10)):
        write(0, str(folder / version / "checkpoints" / f"step={step}.ckpt"), step)
    return folder


def test_nothing_there_is_a_beginning(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / ".step=1.ckpt.writing-12").mkdir()
    assert newest_checkpoint(tmp_path) is None, "what was never finished is no checkpoint"


def test_the_most_steps_count_and_not_names_or_times(folder: Path, tmp_path: Path) -> None:
    here = copy(folder, tmp_path / "here")
    (here / "last.ckpt").symlink_to("version_0/checkpoints/step=9.ckpt")
    assert newest_checkpoint(here) == str(here / "version_1/checkpoints/step=10.ckpt")
    torch.save({"global_step": 11, "state_dict": {}}, here / "file.ckpt")
    assert newest_checkpoint(here) == str(here / "file.ckpt")


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_twenty_times_damaged_and_the_one_before_is_used(how: str, folder: Path, tmp_path: Path) -> None:
    inside = Path("version_1/checkpoints/step=10.ckpt")
    for number, (name, position) in enumerate(positions(folder / inside, 20, seed=11)):
        here = copy(folder, tmp_path / str(number))
        content = bytearray((here / inside / name).read_bytes())
        if how == "bit":
            content[position] ^= 1 << number % 8
        else:
            del content[position:]
        (here / inside / name).write_bytes(content)
        with pytest.warns(UserWarning, match=rf"skipped: .*{name}"):
            assert newest_checkpoint(here) == str(here / "version_0/checkpoints/step=9.ckpt")


def test_a_cut_file_is_skipped(folder: Path, tmp_path: Path) -> None:
    here = copy(folder, tmp_path / "here")
    torch.save({"global_step": 11, "state_dict": {"w": torch.zeros(1000)}}, here / "file.ckpt")
    content = (here / "file.ckpt").read_bytes()
    (here / "file.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"skipped: .*file\.ckpt is no whole Lightning checkpoint"):
        assert newest_checkpoint(here) == str(here / "version_1/checkpoints/step=10.ckpt")


def test_beginning_anew_beside_damaged_checkpoints_is_somebodys_decision(folder: Path, tmp_path: Path) -> None:
    here = copy(folder, tmp_path / "here")
    shutil.rmtree(here / "version_0")
    (here / "version_1/checkpoints/step=10.ckpt/state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact(.*\n)+  - .*state\.pt is missing"):
        newest_checkpoint(here)


def test_an_imported_model_is_a_beginning_and_no_way_on(folder: Path, tmp_path: Path) -> None:
    torch.save({"global_step": 0, "state_dict": {}}, tmp_path / "base.ckpt")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "base.ckpt")
    here = copy(folder, tmp_path / "here")
    (tmp_path / "base.ckpt").rename(here / "base.ckpt")
    (here / "version_1/checkpoints/step=10.ckpt/state.pt").unlink()
    with pytest.warns(UserWarning, match="skipped: "):
        assert newest_checkpoint(here) == str(here / "version_0/checkpoints/step=9.ckpt")
    (here / "version_0/checkpoints/step=9.ckpt/state.pt").unlink()
    words = r"is intact but .*base\.ckpt, which is a beginning; move these away .*:(\n  - .*state\.pt is missing.*){2}$"
    with pytest.raises(CheckpointError, match=words):
        newest_checkpoint(here)


def test_without_reading_tensors_only_the_rest_is_checked(folder: Path, tmp_path: Path) -> None:
    here = copy(folder, tmp_path / "here")
    newest = here / "version_1/checkpoints/step=10.ckpt"
    shard = newest / "rank-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert newest_checkpoint(here, thorough=False) == str(newest)
