"""What a run cannot go on from is refused in one sentence that names the file, and why; and the file stays as it was.

By one process: what several ranks say of damage is in ``test_distributed_checkpoints``, damage itself in
``tests/checkpoint``.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dualpipe import CheckpointError, newest_checkpoint
from lightning_dualpipe.cli import main
from lightning_dualpipe.errors import ConfigurationError
from tests.strategy.runs import Run, build, write_corpus

SHARDS = {"pipeline_parallel_size": 1, "save_distributed_checkpoint": True}
LAYERS = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``directory.ckpt``, ``file.ckpt``, an exported model, and what is none of them."""
    folder = tmp_path_factory.mktemp("bad")
    run = run_of(folder)
    module: Any = save(run, folder / "directory.ckpt")
    save(replace(run, strategy={"pipeline_parallel_size": 1}), folder / "file.ckpt")
    module.save_pretrained(folder / "exported")
    whole = (folder / "file.ckpt").read_bytes()
    (folder / "empty.ckpt").touch()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.ckpt").write_text("hello, world")
    torch.save({"weights": 1}, folder / "other.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    (folder / "evil.ckpt").write_bytes(pickle.dumps(Evil(folder / "it ran")))
    content = torch.load(folder / "file.ckpt", weights_only=True)
    torch.save({**content, "state_dict": dict(list(content["state_dict"].items())[1:])}, folder / "less.ckpt")
    (folder / "nothing.ckpt").mkdir()
    return folder


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def run_of(folder: Path) -> Run:
    corpus = folder / "corpus.txt"
    path = str(corpus) if corpus.exists() else write_corpus(folder)
    return Run(SHARDS, corpus=path, steps=1, overrides=LAYERS)


def save(run: Run, path: Path) -> L.LightningModule:
    trainer, module, data = build(0, run)
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
    return module


def resume(folder: Path, name: str, **changes: Any) -> None:
    trainer, module, data = build(0, replace(run_of(folder), steps=2, **changes))
    trainer.fit(module, data, ckpt_path=str(folder / name))


UNREADABLE: Mapping[str, str] = {
    "nowhere.ckpt": "cannot be read: Checkpoint file not found",
    "empty.ckpt": "is no whole Lightning checkpoint: it is empty",
    "cut.ckpt": "is no whole Lightning checkpoint: RuntimeError: PytorchStreamReader failed reading zip archive",
    "notes.ckpt": "is no whole Lightning checkpoint: ",
    "other.ckpt": "is no Lightning checkpoint: it has no pytorch-lightning_version, but weights",
    "list.ckpt": "is no Lightning checkpoint: it has no pytorch-lightning_version, but a list",
    "evil.ckpt": "is no whole Lightning checkpoint: UnpicklingError: Unsupported operand",
    "nothing.ckpt": r"is no checkpoint: it has no manifest\.json, which is written last \(it is empty\)",
    "exported": r"is no checkpoint: it has no manifest\.json, .*it holds .*config\.json",
    "exported/config.json": "is no whole Lightning checkpoint: ",
    "directory.ckpt/manifest.json": "is no whole Lightning checkpoint: ",
    "directory.ckpt/rank-00000.safetensors": "is no whole Lightning checkpoint: ",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_checkpoint_of_a_run_is_told_apart(name: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} {UNREADABLE[name]}.*Nothing was loaded") as refused:
        resume(folder, name)
    assert not (folder / "it ran").exists()
    assert len(str(refused.value)) < 500


ANOTHER_MODEL: Mapping[str, tuple[dict[str, Any], str]] = {
    "fewer layers": ({"num_hidden_layers": 1}, r"16 tensors in it are unknown to this model: model\.blocks\.1\."),
    "more layers": ({"num_hidden_layers": 3}, r"16 tensors of this model are missing in it: model\.blocks\.2\."),
    "more experts": (
        {**LAYERS, "n_routed_experts": 8},
        r"8 tensors have another shape: .*\(4, 32\), here \(8, 32\)",
    ),
}


@pytest.mark.parametrize("kind", ["file.ckpt", "directory.ckpt"])
@pytest.mark.parametrize("model", ANOTHER_MODEL)
def test_a_checkpoint_of_another_model_is_refused(model: str, kind: str, folder: Path) -> None:
    overrides, words = ANOTHER_MODEL[model]
    with pytest.raises(ConfigurationError, match=rf"belongs to another model(.*\n)+  - {words}"):
        resume(folder, kind, overrides=overrides)


def test_a_file_without_one_of_the_tensors_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"1 tensors of this model are missing in it: model\.embed_tokens"):
        resume(folder, "less.ckpt")


@pytest.mark.parametrize("kind", ["file.ckpt", "directory.ckpt"])
def test_an_optimizer_of_other_groups_is_refused(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_dualpipe import DeepSeekV3

    monkeypatch.setattr(DeepSeekV3, "configure_optimizers", lambda self: torch.optim.SGD(self.parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match=r"groups of \[33, 16\] parameters, this one of \[49\]; resume with"):
        resume(folder, kind)


@pytest.mark.parametrize("kind", ["file.ckpt", "directory.ckpt"])
def test_another_precision_goes_on(kind: str, folder: Path) -> None:
    resume(folder, kind, precision="bf16-true")


# ---- where a folder is expected, and where a directory ---------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file.ckpt", "is a file, and the newest checkpoint is looked for in a folder"),
        ("directory.ckpt", "is a checkpoint, and the newest checkpoint is looked for in a folder"),
    ],
)
def test_the_newest_of_a_checkpoint_itself_is_no_beginning(name: str, words: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=words):
        newest_checkpoint(folder / name)


COMMANDS: Mapping[str, tuple[Callable[[Path], list[str]], str]] = {
    "verify a file": (lambda at: ["verify", f"{at}/file.ckpt"], "is a file, and this is for checkpoint directories"),
    "consolidate a file": (lambda at: ["consolidate", f"{at}/file.ckpt", "new"], "file.ckpt is a file, and this is"),
    "consolidate an export": (lambda at: ["consolidate", f"{at}/exported", "new"], "exported is no checkpoint: it"),
    "into a directory": (
        lambda at: ["consolidate", f"{at}/directory.ckpt", f"{at}/exported", "--overwrite"],
        "exported cannot be written: [Errno 21] Is a directory",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_say_in_one_line_what_they_cannot_do(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, words = COMMANDS[case]
    before = sorted(path.name for path in folder.iterdir())
    assert main(command(folder)) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-dualpipe: error: ") and words in error and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before and not Path("new").exists()
