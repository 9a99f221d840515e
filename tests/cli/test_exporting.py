"""``lightning-dualpipe export``: what ``save_pretrained`` writes, byte for byte, and a tokenizer with equal ids."""

import errno
import json
import os
import random
import shutil
import signal
import stat
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_dualpipe import DeepSeekV3, DualPipeStrategy, TextDataModule
from lightning_dualpipe.checkpoint import stored
from lightning_dualpipe.checkpoint.stored import read_whole
from lightning_dualpipe.cli import main, trained
from lightning_dualpipe.cli.exporting import export_checkpoint
from lightning_dualpipe.data.tokenizers import BYTE_BOS, ByteTokenizer, load_tokenizer
from lightning_dualpipe.deepseek_v3 import hf_stream
from lightning_dualpipe.deepseek_v3.hf_tokenizer import served_tokenizer_files
from lightning_dualpipe.errors import CheckpointError, ConfigurationError
from tests.data.test_tokenizers import trained_file
from tests.marks import needs
from tests.strategy.runs import QUIET, SHAPE

SIZES: Any = {**SHAPE, "num_hidden_layers": 2, "num_nextn_predict_layers": 1, "tie_word_embeddings": True}
TEXTS = ["", "a", " a  b\n\n\t", "def f(x):\n    return x  # äöü € 漢字 😀\u200b", "\x00\x7f\u00ad", "</s><s>[EOS]"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a run of two steps, optimizer included."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "corpus.txt").write_text(Path(L.__file__).read_text() * 8)
    data = TextDataModule(
        str(folder / "corpus.txt"), 32, batch_size=2, cache_dir=folder / "cache", validation_fraction=0.0
    )
    strategy = DualPipeStrategy(pipeline_parallel_size=1, schedule="1f1b", save_distributed_checkpoint=True)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=2, **QUIET)
    trainer.fit(DeepSeekV3("tiny", SIZES, learning_rate=1e-2, warmup_steps=1), data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def file(directory: Path) -> Path:
    path = directory.parent / "file.ckpt"
    torch.save(read_whole(directory), path)
    return path


@pytest.fixture(scope="module")
def module(file: Path) -> DeepSeekV3:
    return DeepSeekV3.load_from_checkpoint(file, map_location="cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "float8_block", "float8_block_power_of_two"])
@pytest.mark.parametrize("size", ["5GB", "9KB"])
@pytest.mark.filterwarnings("ignore:transformers")
def test_the_files_are_those_of_save_pretrained(
    dtype: Any, size: str, directory: Path, file: Path, module: DeepSeekV3, tmp_path: Path
) -> None:
    module.save_pretrained(tmp_path / "loaded", dtype=dtype, max_shard_size=size)
    expected = contents(tmp_path / "loaded")
    assert len([name for name in expected if name.endswith(".safetensors")]) > (4 if size == "9KB" else 0)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(expected)
    for name, checkpoint in (("of_directory", directory), ("of_file", file)):
        plan = export_checkpoint(checkpoint, tmp_path / name, dtype=dtype, max_shard_size=size)
        assert contents(tmp_path / name) == expected, name
        assert {each.name for each in plan} == {each for each in expected if each.endswith(".safetensors")}


def test_several_processes_write_the_same(directory: Path, file: Path, tmp_path: Path) -> None:
    export_checkpoint(file, tmp_path / "alone", max_shard_size="20KB")
    arguments = ["--shard-size", "20KB", "--processes", "2"]
    assert main(["export", str(directory), str(tmp_path / "together"), *arguments]) == 0
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_files_can_be_read_by_whom_the_umask_lets(file: Path, tmp_path: Path) -> None:
    """A server is often another user; the library that writes tensors lets nobody else read."""
    export_checkpoint(file, tmp_path / "served")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "served").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_a_file_at_a_time_is_in_memory_and_nothing_of_the_optimizer_is_read(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, size = 24_000, 20_000
    read, read_block, write = trained.Trained.read, stored._Files.read, hf_stream.write_shard
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most_read, most_written, sections = [0], [0], set()

    def held() -> int:
        return sum(tensor.nbytes for tensor in list(alive))

    def reading(self: Any, wanted: Any) -> list[Tensor]:
        found = read(self, wanted)
        alive.update(found)
        most_read.append(held())
        return found

    def reading_block(self: Any, block: Any, entry: Any) -> Any:
        sections.add(entry.key.section)
        return read_block(self, block, entry)

    def writing(tensors: dict[str, Tensor], path: Path) -> None:
        most_written.append(sum(tensor.nbytes for tensor in tensors.values()))
        write(tensors, path)

    monkeypatch.setattr(trained.Trained, "read", reading)
    monkeypatch.setattr(stored._Files, "read", reading_block)
    monkeypatch.setattr(hf_stream, "write_shard", writing)
    monkeypatch.setattr(hf_stream, "_READ_AT_ONCE", at_once)
    plan = export_checkpoint(directory, tmp_path / "served", dtype="float32", max_shard_size=size)
    largest = max(tensor.size for each in plan for tensor in each.tensors.values())  # the embedding
    assert sum(each.size for each in plan) > 4 * (at_once + largest)
    assert at_once / 2 < max(most_read) <= at_once + largest  # the last one of those before is let go after reading
    assert len(most_written) == len(plan) + 1 and max(most_written) == max(
        size_of for size_of in [e.size for e in plan]
    )
    assert max(most_written) <= max(size, largest)
    assert sections == {"state_dict"}


def test_weights_with_an_average_are_the_average(file: Path, tmp_path: Path) -> None:
    """As ``load_from_checkpoint`` has them."""
    content = torch.load(file, weights_only=True)
    content["current_model_state"] = {name: tensor + 1 for name, tensor in content["state_dict"].items()}
    torch.save(content, tmp_path / "averaged.ckpt")
    for name, source in (("one", file), ("other", tmp_path / "averaged.ckpt")):
        export_checkpoint(source, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


# ---- tokenizers -----------------------------------------------------------------------------------


@needs("transformers")
def test_bytes_are_read_as_they_were_trained_on(file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_checkpoint(file, tmp_path)
    ours, theirs = ByteTokenizer(), AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(0)
    for text in [*TEXTS, "".join(chr(draw.randrange(1, 0xD000)) for _ in range(3000))]:
        ids = ours.encode([text])[0].tolist()
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == [BYTE_BOS, *ids]
        assert theirs.decode(ids) == text
    for _ in range(200):  # among them halves of characters, and special tokens
        ids = [draw.randrange(264) for _ in range(30)]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    assert len(theirs) == ours.vocab_size and theirs.model_max_length == 4096
    messages = [{"role": "user", "content": "Hü?"}, {"role": "assistant", "content": "Ja."}]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert asked == [BYTE_BOS, *"user: Hü?\n\nassistant: Ja.\n\nassistant:".encode()]


def test_an_exported_tokenizer_of_bytes_is_bytes_again_without_any_package(file: Path, tmp_path: Path) -> None:
    export_checkpoint(file, tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text().replace('"a": 97', '"a": 300'))
    assert not isinstance(load_tokenizer(tmp_path), ByteTokenizer)


@needs("transformers")
@pytest.mark.parametrize("special", [["<s>", "</s>"], ["<|endoftext|>"]])
@pytest.mark.parametrize("truncate", [False, True])
def test_a_tokenizer_file_gives_the_ids_of_the_training(
    special: list[str], truncate: bool, file: Path, tmp_path: Path
) -> None:
    """Whatever the file cuts, fills up and adds by itself."""
    from transformers import AutoTokenizer

    path = trained_file(tmp_path / "own.json", special, truncate=truncate)
    content = torch.load(file, weights_only=True)
    ours = load_tokenizer(path)
    content["hyper_parameters"]["overrides"]["vocab_size"] = ours.vocab_size
    content["hyper_parameters"]["token_ids"] = {"bos_token_id": ours.bos, "eos_token_id": ours.eos}
    for name in ("model.embed_tokens.weight", "model.lm_head.weight"):
        content["state_dict"][name] = torch.zeros(ours.vocab_size, SIZES["hidden_size"])
    torch.save({**content, "tokenizer_files": ours.files}, tmp_path / "with_files.ckpt")
    torch.save({**content, "tokenizer_files": {}}, tmp_path / "without.ckpt")
    export_checkpoint(tmp_path / "with_files.ckpt", tmp_path / "known")
    export_checkpoint(tmp_path / "without.ckpt", tmp_path / "given", tokenizer=path)
    assert contents(tmp_path / "known") == contents(tmp_path / "given")

    theirs = AutoTokenizer.from_pretrained(tmp_path / "known")
    assert theirs.eos_token_id == ours.eos and theirs.bos_token_id == ours.bos
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert theirs(text, add_special_tokens=False).input_ids == ids.tolist()
        assert theirs(text).input_ids == [*([ours.bos] if ours.bos is not None else []), *ids.tolist()]
        assert theirs.decode(ids.tolist(), skip_special_tokens=True) == ours.decode(ids.tolist())
    asked = theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert asked == (special[0] if ours.bos is not None else "") + "user: x\n\nassistant:"


def test_a_published_tokenizer_goes_out_as_it_came_in(tmp_path: Path) -> None:
    trained_file(tmp_path / "tokenizer.json", ["<s>", "</s>"], truncate=True)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "chat_template": "{{ messages }}"}')
    files = load_tokenizer(tmp_path).files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert served_tokenizer_files(files, {"bos_token_id": 0}, longest=7) == files
    assert files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_text()


def test_a_checkpoint_that_does_not_know_its_tokenizer_says_so(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(file, weights_only=True)
    del content["tokenizer_files"]
    torch.save(content, tmp_path / "old.ckpt")
    assert main(["export", str(tmp_path / "old.ckpt"), str(tmp_path / "served")]) == 0
    assert "give it by --tokenizer" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "old.ckpt"), str(tmp_path / "with"), "--tokenizer", "bytes"]) == 0
    assert "--tokenizer" not in capsys.readouterr().err
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(contents(tmp_path / "with"))
    eos = json.loads((tmp_path / "with" / "generation_config.json").read_text())["eos_token_id"]
    assert eos == ByteTokenizer.eos


# ---- what cannot work -----------------------------------------------------------------------------


def empty(folder: Path, *_: Path) -> list[str]:
    (folder / "empty").mkdir()
    return ["empty", "out"]


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[..., list[str]]:
    def make(folder: Path, file: Path, directory: Path) -> list[str]:
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, folder / "changed.ckpt")
        return ["changed.ckpt", "out"]

    return make


def spoilt(change: Callable[[bytes], bytes]) -> Callable[..., list[str]]:
    def make(folder: Path, file: Path, directory: Path) -> list[str]:
        shutil.copytree(directory, folder / "spoilt.ckpt")
        shard = folder / "spoilt.ckpt" / "rank-00000.safetensors"
        content = stored.open_stored(folder / "spoilt.ckpt")
        entry = next(e for e in content.index.entries.values() if e.key.section == "state_dict" and len(e.shape) == 3)
        at = entry.blocks[-1].offset
        written = shard.read_bytes()
        shard.write_bytes(written[:at] + change(written[at:]))
        return ["spoilt.ckpt", "out", "--shard-size", "20KB"]

    return make


def with_model(folder: Path, file: Path, directory: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("{}")
    return [str(file), "out"]


def a_file(folder: Path, file: Path, directory: Path) -> list[str]:
    (folder / "out").write_text("mine")
    return [str(file), "out"]


def hugging_face(folder: Path, file: Path, directory: Path) -> list[str]:
    export_checkpoint(file, folder / "hf")
    return ["hf", "out"]


def larger_tokenizer(folder: Path, file: Path, directory: Path) -> list[str]:
    trained_file(folder / "larger.json", ["</s>"])
    return [str(file), "out", "--tokenizer", "larger.json"]


def with_file(*options: str) -> Callable[..., list[str]]:
    return lambda folder, file, directory: [str(file), *(options if options[0] == "/proc/out" else ("out", *options))]


BAD: dict[str, tuple[Callable[..., list[str]], str]] = {
    "nothing there": (lambda *_: ["nowhere.ckpt", "out"], "nowhere.ckpt does not exist"),
    "no checkpoint": (empty, "empty is no checkpoint: it has no manifest.json"),
    "a Hugging Face directory": (hugging_face, "hf is a Hugging Face directory of safetensors, not a checkpoint"),
    "a flipped bit": (spoilt(lambda b: bytes([b[0] ^ 1]) + b[1:]), "rank-00000.safetensors is damaged: bytes"),
    "a cut": (spoilt(lambda b: b[:-7]), "and was written with"),
    "no hyperparameters": (changed(lambda c: c.pop("hyper_parameters")), "is no checkpoint of lightning_dualpipe"),
    "another module": (changed(lambda c: c.update(hyper_parameters={"width": 3})), "is no checkpoint of lightning_dua"),
    "a later version": (changed(lambda c: c["hyper_parameters"].update(new=1)), "that DeepSeekV3 does not take: "),
    "a weight missing": (changed(lambda c: c["state_dict"].pop("model.norm.weight")), "1 missing: model.norm.weight"),
    "a weight too many": (changed(lambda c: c["state_dict"].update(x=torch.ones(1))), "1 unknown: x"),
    "another shape": (
        changed(lambda c: c["state_dict"].update({"model.norm.weight": torch.ones(3)})),
        "1 of another shape: model.norm.weight is [3] and should be [32]",
    ),
    "NaN in FP8": (
        lambda *paths: [
            *changed(lambda c: c["state_dict"]["model.blocks.0.mlp.down_proj.weight"].fill_(float("nan")))(*paths),
            *("--dtype", "float8_block"),
        ],
        "model.layers.0.mlp.down_proj.weight holds nan in row 0",
    ),
    "a model is there": (
        with_model,
        "out already holds a model; choose another directory, or replace it by --overwrite",
    ),
    "a file is there": (a_file, "out is a file, an export needs a directory"),
    "nobody may write": (with_file("/proc/out"), "/proc/out cannot be written"),
    "no processes": (with_file("--processes", "0"), "--processes 0: at least 1 is needed"),
    "no size": (
        with_file("--shard-size", "5 parsecs"),
        "--shard-size 5 parsecs (max_shard_size='5 parsecs') is no size",
    ),
    "no tokenizer": (with_file("--tokenizer", "elsewhere.json"), "elsewhere.json' cannot be read"),
    "a broken tokenizer in it": (
        changed(lambda c: c.update(tokenizer_files={"tokenizer.json": "{}"})),
        "the tokenizer.json in changed.ckpt is no tokenizer of Hugging Face's",
    ),
    "a larger tokenizer": (larger_tokenizer, "the tokenizer has ids up to"),
    "eos of no tokenizer": (with_file("--eos-token", "<x>"), "--eos-token '<x>' is for a tokenizer that --tokenizer"),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
@needs("tokenizers")
def test_what_cannot_be_exported_is_one_clear_error(
    make: Callable[..., list[str]],
    words: str,
    file: Path,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = make(tmp_path, file, directory)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("lightning-dualpipe: error: ") and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before  # neither half a directory, nor anything lost


def test_a_dtype_that_is_not_written_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="dtype='float16' is not written; use one of"):
        export_checkpoint(file, tmp_path / "out", dtype="float16")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_leaves_the_model_that_was_there(
    after: int, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    export_checkpoint(file, tmp_path / "old")
    before, save_file, calls = contents(tmp_path / "old"), safetensors.torch.save_file, iter(range(after))

    def full(*args: Any, **options: Any) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(*args, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for name in ("old", "new"):
        with pytest.raises(ConfigurationError, match=rf"{name} cannot be written: .*No space left on device"):
            export_checkpoint(file, tmp_path / name, overwrite=True, dtype="float32", max_shard_size="20KB")
    assert contents(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt would run code when it is loaded: it asks for getattr"):
        export_checkpoint(tmp_path / "evil.ckpt", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_process_that_fails_or_is_killed_ends_the_export(directory: Path, tmp_path: Path) -> None:
    arguments = spoilt(lambda b: bytes([b[0] ^ 1]) + b[1:])(tmp_path, directory, directory)
    with pytest.raises(CheckpointError, match="is damaged"):
        export_checkpoint(tmp_path / arguments[0], tmp_path / "out", max_shard_size="20KB", processes=2)
    assert not (tmp_path / "out").exists()

    def kill() -> None:
        while not (children := active_children()):
            time.sleep(0.01)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ConfigurationError, match="a process of the export was killed"):
        export_checkpoint(directory, tmp_path / "out", max_shard_size="20KB", processes=2)
    killer.join()
    assert not (tmp_path / "out").exists()
