"""``lightning-dualpipe generate`` from the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.cli import generating, main
from lightning_dualpipe.cli.generating import _text
from lightning_dualpipe.data.tokenizers import BYTE_BOS, ByteTokenizer, load_tokenizer
from tests.data.test_tokenizers import trained_file
from tests.deepseek_v3.generation.models import greedy_by_full_forwards
from tests.deepseek_v3.small import randomize
from tests.marks import needs
from tests.strategy.runs import QUIET, SHAPE

PROMPT = "import os"


@pytest.fixture(scope="module")
def module() -> DeepSeekV3:
    """Its weights are large enough for its texts to differ, and exact in float32."""
    made = DeepSeekV3("tiny", {**SHAPE, "num_hidden_layers": 2}, token_ids={"eos_token_id": 257})  # type: ignore[arg-type,typeddict-item]
    made.configure_model()
    randomize(made.model)
    with torch.no_grad():
        made.model.lm_head.weight[128:] *= 0.01  # letters are likelier
    return made.float()


@pytest.fixture(scope="module")
def exported(module: DeepSeekV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported")
    module.save_pretrained(directory, dtype="float32", overwrite=True)
    return directory


@pytest.fixture(scope="module")
def checkpoint(module: DeepSeekV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(module, tmp_path_factory.mktemp("checkpoint") / "last.ckpt")


def saved(module: DeepSeekV3, path: Path) -> Path:
    trainer = L.Trainer(accelerator="cpu", devices=1, **QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture(scope="module")
def expected(module: DeepSeekV3) -> list[int]:
    return greedy_by_full_forwards(module.model, [BYTE_BOS, *PROMPT.encode()], 24)


def run(*args: object) -> int:
    return main(["generate", *map(str, args)])


def said(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run(*args) == 0
    return capsys.readouterr().out


# ---- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--speculate", 2], ["--stream"], ["--stream", "--speculate", 3]])
def test_a_model_and_a_checkpoint_continue_a_prompt(
    options: list[Any],
    exported: Path,
    checkpoint: Path,
    expected: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = ByteTokenizer().decode(expected)
    whole = text if "--stream" in options else PROMPT + text
    for source in (("--model", exported), ("--checkpoint", checkpoint)):
        assert (
            said(capsys, *source, "--prompt", PROMPT, "--max-new-tokens", 24, "--ignore-eos", *options) == whole + "\n"
        )


def test_several_prompts_come_from_lines_and_go_out_as_json(
    exported: Path, expected: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"def \n\n{PROMPT}\n")
    options = ["--max-new-tokens", 24, "--ignore-eos", "--json", "--statistics"]
    assert run("--model", exported, "--prompt-file", file, "--lines", *options) == 0
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["prompt"] == "def " and second["prompt"] == PROMPT
    assert second["tokens"] == expected and second["finish_reason"] == "length"
    assert err.startswith("48 tokens in ") and "drafts" not in err
    whole = said(capsys, "--model", exported, "--prompt-file", file, *options)
    assert json.loads(whole)["prompt"] == file.read_text()


def test_what_is_drawn_follows_from_the_seed(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(seed: int) -> str:
        options = ["--temperature", 0.9, "--top-p", 0.9, "--top-k", 20, "--seed", seed, "--max-new-tokens", 12]
        return said(capsys, "--model", exported, "--prompt", PROMPT, "--speculate", 1, *options)

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_text_ends_before_a_stop_of_several_tokens(
    stream: list[str], exported: Path, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    text = bytes(expected[:12]).decode("ascii")
    stop = text[7:9]
    options = ["--max-new-tokens", 24, "--ignore-eos", "--stop", "no such text", "--stop", stop, *stream]
    out = said(capsys, "--model", exported, "--prompt", PROMPT, *options)
    assert out == ("" if stream else PROMPT) + text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("stop", "means"),
    [
        ("€", "€"),
        ("é", "é"),
        ("\\", "\\"),
        (r"a\\n", "a\\n"),
        (r"\n\t", "\n\t"),
        (r"\u20ac", r"\u20ac"),
        (r"\xe9", r"\xe9"),
    ],
)
def test_a_stop_is_text_and_has_three_escapes(
    stop: str, means: str, exported: Path, capsys: Any, monkeypatch: Any
) -> None:
    asked: list[Sequence[str]] = []
    end_of_text = generating._end_of_text
    monkeypatch.setattr(generating, "_end_of_text", lambda *args: asked.append(args[1]) or end_of_text(*args))
    said(capsys, "--model", exported, "--prompt", PROMPT, "--max-new-tokens", 2, "--stop", stop)
    assert asked == [[means]]


def test_halves_of_characters_and_of_stops_are_held_back() -> None:
    tokenizer = ByteTokenizer()
    euro = list("a€".encode())
    assert [_text(tokenizer, euro[:size], [], whole=False) for size in range(1, 5)] == ["a", "a", "a", "a€"]
    assert [_text(tokenizer, b"ab\n\nc"[:size], ["\n\n"], whole=False) for size in range(1, 6)] == [
        *("a", "ab", "ab", "ab", "ab"),
    ]
    assert _text(tokenizer, b"ab\n", ["\n\n"]) == "ab\n"


@needs("tokenizers")
def test_the_tokenizer_beside_the_model_is_taken(
    module: DeepSeekV3, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<eos>": 0, **{letter: index + 1 for index, letter in enumerate("abcdefgh")}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    directory = tmp_path / "with_tokenizer"
    directory.mkdir()
    for file in exported.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tokenizer.save(str(directory / "tokenizer.json"))
    options = ["--prompt", "abc", "--max-new-tokens", 6, "--ignore-eos", "--json"]
    line = json.loads(said(capsys, "--model", directory, *options))
    assert line["tokens"] == greedy_by_full_forwards(module.model, [1, 2, 3], 6)
    assert line["text"] == tokenizer.decode(line["tokens"])


@needs("tokenizers")
@pytest.mark.parametrize("special", [["<s>", "</s>"], ["<s>", "[STOP]"], ["<s>"]])
def test_a_checkpoint_is_asked_in_the_ids_of_its_training(
    special: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the exported model is; a model of pairs of bytes continues bytes without complaint, and wrongly."""
    tokenizer = load_tokenizer(trained_file(tmp_path / "own.json", special), eos_token=special[-1])
    shape: Any = {**SHAPE, "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "vocab_size": tokenizer.vocab_size}
    module = DeepSeekV3("tiny", shape, token_ids={"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos})
    module.configure_model()
    randomize(module.model)
    module.float().tokenizer_files = dict(tokenizer.files)
    module.save_pretrained(tmp_path / "served", dtype="float32")
    path = saved(module, tmp_path / "last.ckpt")
    ids = tokenizer.encode([PROMPT])[0].tolist()
    assert (ids != list(PROMPT.encode())) and (tokenizer.bos is None) == (special == ["<s>"])
    expected = greedy_by_full_forwards(module.model, [*([tokenizer.bos] if len(special) > 1 else []), *ids], 6)
    options = ["--prompt", PROMPT, "--max-new-tokens", 6, "--ignore-eos", "--json"]
    lines = [said(capsys, *source, *options) for source in (("--checkpoint", path), ("--model", tmp_path / "served"))]
    assert lines[0] == lines[1]
    assert json.loads(lines[0])["tokens"] == expected and json.loads(lines[0])["text"] == tokenizer.decode(expected)
    of_bytes = json.loads(said(capsys, "--checkpoint", path, "--tokenizer", "bytes", *options))
    assert of_bytes["tokens"] == greedy_by_full_forwards(module.model, [BYTE_BOS, *PROMPT.encode()], 6)

    module.tokenizer_files = {}
    module.save_pretrained(tmp_path / "unknown", dtype="float32")
    saved(module, tmp_path / "unknown.ckpt")
    for source in (("--checkpoint", tmp_path / "unknown.ckpt"), ("--model", tmp_path / "unknown")):
        assert f"{source[1]} does not say which tokenizer it was trained with: give it by --tokenizer" in refused(
            capsys, *source, *options
        )
        assert said(capsys, *source, *options, "--tokenizer", tmp_path / "own.json", "--eos-token", special[-1])


# ---- what is refused ------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-dualpipe: error: ") and error.count("error: ") == 1 and "Traceback" not in error
    return error


def test_wrong_files_are_named(
    exported: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ("--prompt", PROMPT)
    missing, empty, other, cut = (tmp_path / name for name in ("missing", "empty.ckpt", "other.ckpt", "cut.ckpt"))
    empty.write_bytes(b"")
    torch.save({"state_dict": {}, "hyper_parameters": {"width": 3}}, other)
    cut.write_bytes(checkpoint.read_bytes()[:2000])
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    assert f"{missing} does not exist: give a local directory" in refused(capsys, "--model", missing, *prompt)
    assert f"{missing} does not exist" in refused(capsys, "--checkpoint", missing, *prompt)
    for path, reason in (
        (empty, "it is empty"),
        (cut, "RuntimeError: PytorchStreamReader failed"),
        (exported / "config.json", "it is no archive of torch.save"),
    ):
        error = refused(capsys, "--checkpoint", path, *prompt)
        assert f"{path} is no whole Lightning checkpoint: {reason}" in error
    assert "is a Hugging Face directory of safetensors, not a checkpoint" in refused(
        capsys, "--checkpoint", exported, *prompt
    )
    assert "no checkpoint of lightning_dualpipe.DeepSeekV3" in refused(capsys, "--checkpoint", other, *prompt)
    assert "is a file: give the directory" in refused(capsys, "--model", exported / "config.json", *prompt)
    for path in (missing, latin):
        assert f"--prompt-file {path} cannot be read" in refused(capsys, "--model", exported, "--prompt-file", path)
    assert "tokenizer" in refused(capsys, "--model", exported, *prompt, "--tokenizer", missing)


def test_a_checkpoint_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    error = refused(capsys, "--checkpoint", tmp_path / "evil.ckpt", "--prompt", "x")
    assert "evil.ckpt would run code when it is loaded: it asks for getattr" in error
    assert "\x1b" not in error and "can still be loaded" not in error
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_whose_weights_are_anothers_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"].pop("model.norm.weight")
    torch.save(content, tmp_path / "other.ckpt")
    error = refused(capsys, "--checkpoint", tmp_path / "other.ckpt", "--prompt", "x")
    assert "are not those of its configuration" in error and "model.norm.weight" in error


def test_wrong_requests_are_explained(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("--prompt", ""): "--prompt is empty",
        ("--prompt", "x", "--lines"): "--lines has no effect without --prompt-file",
        ("--prompt", "x", "--prompt", "y", "--stream"): "--stream writes one text, and there are 2 prompts",
        ("--prompt", "x", "--stop", ""): "--stop '' would end every text at once",
        ("--prompt", "x", "--stop", "\udce9"): "--stop '\\udce9' is not UTF-8",
        ("--prompt", "\udce9"): "--prompt '\\udce9' is not UTF-8",
        ("--prompt", "x", "--temperature", -1): "temperature=-1.0 must be 0",
        ("--prompt", "x", "--top-p", 0.5): "have no effect at temperature=0",
        ("--prompt", "x", "--max-new-tokens", 100000): "exceeds max_position_embeddings=4096",
        ("--prompt", "x", "--device", "cuda:77"): "--device cuda:77 cannot be used",
    }
    for args, message in wrong.items():
        assert message in refused(capsys, "--model", exported, *args)
    small = tmp_path / "small"
    shape: Any = {**SHAPE, "num_hidden_layers": 1, "vocab_size": 200, "num_nextn_predict_layers": 0}
    DeepSeekV3("tiny", shape).save_pretrained(small)
    error = refused(capsys, "--model", small, "--prompt", "x", "--tokenizer", "bytes")
    assert "the tokenizer bytes has 264 ids, the model vocab_size=200" in error
