"""``lightning-dualpipe import``, and runs that begin with a Hugging Face directory."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dualpipe import DeepSeekV3, DualPipeStrategy, TextDataModule
from lightning_dualpipe.cli import main
from lightning_dualpipe.cli.exporting import export_checkpoint
from lightning_dualpipe.cli.importing import import_pretrained
from lightning_dualpipe.data.tokenizers import ByteTokenizer
from lightning_dualpipe.errors import ConfigurationError
from tests.deepseek_v3.small import randomize
from tests.strategy.runs import QUIET, SHAPE

SIZES: Any = {**SHAPE, "num_hidden_layers": 2, "tie_word_embeddings": True}
TOKEN_IDS: Any = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


@pytest.fixture(scope="module")
def module() -> DeepSeekV3:
    made = DeepSeekV3("tiny", SIZES, token_ids=TOKEN_IDS)
    made.configure_model()
    randomize(made.model)
    made.tokenizer_files = dict(ByteTokenizer().files)
    return made.float()


@pytest.fixture(scope="module")
def published(module: DeepSeekV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    module.save_pretrained(directory, dtype="float32", max_shard_size="30KB")
    return directory


@pytest.fixture(scope="module")
def imported(published: Path) -> Path:
    path = published.with_name("imported.ckpt")
    import_pretrained(published, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_imported_goes_out_as_it_came_in(module: DeepSeekV3, published: Path, imported: Path, tmp_path: Path):
    loaded = DeepSeekV3.load_from_checkpoint(imported, map_location="cpu")
    assert loaded.config == module.config and loaded.hparams["token_ids"] == TOKEN_IDS
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    export_checkpoint(imported, tmp_path / "again", dtype="float32", max_shard_size="30KB")
    assert contents(tmp_path / "again") == contents(published)


def test_fp8_comes_back_bit_by_bit(module: DeepSeekV3, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path / "fp8", dtype="float8_block")
    assert main(["import", str(tmp_path / "fp8"), str(tmp_path / "base.ckpt")]) == 0
    export_checkpoint(tmp_path / "base.ckpt", tmp_path / "again", dtype="float8_block")
    assert contents(tmp_path / "again") == contents(tmp_path / "fp8")


def test_bfloat16_takes_half_and_keeps_the_routers_bias(module: DeepSeekV3, published: Path, tmp_path: Path) -> None:
    assert main(["import", str(published), str(tmp_path / "half.ckpt"), "--dtype", "bfloat16"]) == 0
    found = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor if name.endswith("correction_bias") else tensor.bfloat16()), name


def data_for(folder: Path) -> TextDataModule:
    (folder / "corpus.txt").write_text(Path(L.__file__).read_text() * 20)
    return TextDataModule(str(folder / "corpus.txt"), 32, batch_size=4, cache_dir=folder / "cache")


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_run_begins_with_the_checkpoint_or_with_the_directory(
    pipeline: bool, module: DeepSeekV3, published: Path, imported: Path, tmp_path: Path
) -> None:
    """At step 0, with a new optimizer, and with the loss that the model has."""

    def trainer() -> L.Trainer:
        strategy: Any = DualPipeStrategy(pipeline_parallel_size=1, schedule="1f1b") if pipeline else "auto"
        return L.Trainer(
            strategy=strategy, accelerator="cpu", devices=1, max_steps=2, **{**QUIET, "limit_val_batches": 2}
        )

    data = data_for(tmp_path)
    (expected,) = trainer().validate(module, data, verbose=False)
    losses = []
    for begins, path in ((DeepSeekV3("tiny", SIZES), imported), (DeepSeekV3(pretrained=published), None)):
        (found,) = trainer().validate(begins, data, ckpt_path=path, verbose=False)
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    for begins, path in ((DeepSeekV3("tiny", SIZES), imported), (DeepSeekV3(pretrained=published), None)):
        fitted = trainer()
        fitted.fit(begins, data, ckpt_path=path)
        assert fitted.global_step == 2
        losses.append(float(fitted.callback_metrics["train_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_from_the_command_line_begins_with_the_directory_and_does_not_need_it_again(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data_for(tmp_path)
    (tmp_path / "tune.yaml").write_text(
        json.dumps(
            {
                "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0, **QUIET}
                | {
                    "enable_checkpointing": True,
                    "callbacks": [
                        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "runs", "filename": "last"}}
                    ],
                },
                "model": {"class_path": "lightning_dualpipe.DeepSeekV3", "init_args": {"pretrained": str(published)}},
                "data": {
                    "class_path": "lightning_dualpipe.TextDataModule",
                    "init_args": {"path": "corpus.txt", "sequence_length": 32, "batch_size": 4, "cache_dir": "cache"},
                },
            }
        )
    )
    assert main(["fit", "--config", "tune.yaml", "--model.learning_rate", "0.0"]) == 0
    (path,) = (tmp_path / "runs").iterdir()
    aside = published.rename(published.with_name("elsewhere"))
    try:
        export_checkpoint(path, tmp_path / "tuned", dtype="float32", max_shard_size="30KB")
    finally:
        aside.rename(published)
    tuned, before = contents(tmp_path / "tuned"), contents(published)
    assert tuned.keys() == before.keys() and tuned["config.json"] == before["config.json"]


def test_a_preset_beside_a_directory_is_refused(published: Path) -> None:
    with pytest.raises(ConfigurationError, match="preset='small' has no effect beside pretrained="):
        DeepSeekV3("small", pretrained=published)
    with pytest.raises(ConfigurationError, match="have no effect beside config"):
        DeepSeekV3(config=DeepSeekV3(pretrained=published).config, pretrained=published)


# ---- what cannot work -----------------------------------------------------------------------------


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return edit


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def first_shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


INDEX = "model.safetensors.index.json"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (lambda path: path.rename(path.with_name("away")), "does not exist: give a local directory"),
    "no configuration": (lambda path: (path / "config.json").unlink(), "config.json does not exist"),
    "another model": (edited("config.json", lambda c: c.update(model_type="llama", architectures=[])), "another model"),
    "another size": (edited("config.json", lambda c: c.update(q_lora_rank=8)), "of another shape: "),
    "a file that is not there": (
        edited(INDEX, lambda c: c["weight_map"].update({"model.norm.weight": "gone.safetensors"})),
        f"gone.safetensors is named by {INDEX} but absent",
    ),
    "a tensor that is not there": (
        edited(INDEX, lambda c: c["weight_map"].pop("model.norm.weight")),
        "model.norm.weig",
    ),
    "a cut": (lambda path: os.truncate(first_shard(path), 100), "truncated or damaged"),
    "a pointer": (
        lambda path: first_shard(path).write_text("version https://git-lfs.github.com/spec"),
        "a Git LFS pointer",
    ),
    "no tokenizer file": (lambda path: (path / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json cannot be read"),
    "a tokenizer that is no JSON": (written("tokenizer.json", "{nope"), "hf/tokenizer.json is no JSON ("),
    "a tokenizer that is a list": (written("tokenizer.json", "[]"), "hf/tokenizer.json is no JSON object"),
    "a tokenizer of nothing": (written("tokenizer.json", "{}"), "hf/tokenizer.json is no tokenizer of Hugging Face's"),
    "a vocabulary of text": (
        written("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}'),
        "hf/tokenizer.json is no tokenizer of Hugging Face's",
    ),
    "settings that are no JSON": (written("tokenizer_config.json", ""), "hf/tokenizer_config.json is no JSON ("),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_imported_is_one_clear_error(
    spoil: Callable[[Path], object],
    words: str,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "hf"
    directory.mkdir()
    for name, content in contents(published).items():
        (directory / name).write_bytes(content)
    spoil(directory)
    (tmp_path / "old.ckpt").write_text("old")
    assert main(["import", str(directory), str(tmp_path / "old.ckpt"), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("error: ") == 1 and "Traceback" not in error
    assert (tmp_path / "old.ckpt").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"old.ckpt", "hf", "away"}


def test_a_file_that_exists_or_cannot_be_written_is_told(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.ckpt").write_text("old")
    with pytest.raises(ConfigurationError, match=r"old\.ckpt exists; give another name, or pass --overwrite"):
        import_pretrained(published, tmp_path / "old.ckpt")
    with pytest.raises(ConfigurationError, match=r"/proc/new\.ckpt cannot be written"):
        import_pretrained(published, "/proc/new.ckpt")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigurationError, match=r"old\.ckpt cannot be written: .*No space left"):
        import_pretrained(published, tmp_path / "old.ckpt", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"] and (tmp_path / "old.ckpt").read_text() == "old"
