"""``consolidate`` and ``verify`` on a directory that two ranks have written."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero

from lightning_dualpipe.cli import main
from lightning_dualpipe.cli.training import TrainingCLI
from tests.checkpoint.damage import tensors, write
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "4.ckpt"
    run_ranks(2, write, str(path), 4, 2)
    return path


def test_one_file_is_made_of_a_directory(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new/one.ckpt"
    assert main(["consolidate", str(directory), str(file)]) == 0
    found = torch.load(file, weights_only=True)
    assert found["global_step"] == 4
    assert set(found["state_dict"]) == {*tensors(4), "head"}
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in tensors(4).items())
    assert "one.ckpt: step 4, " in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["one.ckpt"]

    before = file.read_bytes()
    assert main(["consolidate", str(directory), str(file)]) == 2
    assert "one.ckpt exists; pass --overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert main(["consolidate", str(directory), str(file), "--overwrite"]) == 0


def test_verify_reads_every_byte(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(directory)]) == 0
    assert "4.ckpt: intact. Step 4, 4 tensors, " in capsys.readouterr().out
    shard = directory / "rank-00001.safetensors"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for command in (["verify", str(directory)], ["consolidate", str(directory), "one.ckpt"]):
            assert main(command) == 2
            assert "rank-00001.safetensors is damaged: bytes" in capsys.readouterr().err
        assert not Path("one.ckpt").exists()
    finally:
        shard.write_bytes(content)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["verify", "nowhere.ckpt"], "nowhere.ckpt is no checkpoint: there is nothing of that name"),
        (["consolidate", "nowhere.ckpt", "one.ckpt"], "nowhere.ckpt is no checkpoint"),
    ],
)
def test_what_is_not_there_is_one_clear_error(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_cannot_be_written_leaves_nothing(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["consolidate", str(directory), "/proc/one.ckpt"]) == 2
    assert "/proc/one.ckpt cannot be written" in capsys.readouterr().err


def test_fit_goes_on_from_the_newest_or_begins_and_says_so(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(rank_zero, "rank_zero_info", said.append)
    asked: list[object] = []
    cli = TrainingCLI.__new__(TrainingCLI)  # what it does once the Trainer is there
    cli.trainer = SimpleNamespace(fit=lambda **options: asked.append(options["ckpt_path"]))  # type: ignore[assignment]
    for path in (f"newest:{directory.parent}", f"newest:{tmp_path}", f"newest:{tmp_path}/typo", "some.ckpt", None):
        cli.fit(ckpt_path=path)
    assert asked == [str(directory), None, None, "some.ckpt", None]
    assert said == [
        f"no checkpoint in {tmp_path}: beginning at step 0",
        f"no checkpoint in {tmp_path}/typo, which does not exist: beginning at step 0",
    ]
