import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_dualpipe.data.tokenizers import BYTE_BOS, BYTE_EOS, BYTE_PAD, BYTE_VOCABULARY, load_tokenizer
from lightning_dualpipe.errors import ConfigurationError, MissingPackageError

TEXT = "def f(x):\n    return x  # äöü €\n"


def trained_file(path: Path, special: list[str], **settings: Any) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    if settings.get("truncate"):
        tokenizer.enable_truncation(max_length=4)
        tokenizer.enable_padding(length=8)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    tokenizer.save(str(path))
    return path


def test_bytes_are_the_default_and_need_no_file() -> None:
    tokenizer = load_tokenizer()
    (ids,) = tokenizer.encode([TEXT])
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode([BYTE_BOS, *ids.tolist(), BYTE_EOS]) == TEXT
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (BYTE_BOS, BYTE_EOS, BYTE_VOCABULARY)
    assert len({BYTE_BOS, BYTE_EOS, BYTE_PAD}) == 3 and max(BYTE_BOS, BYTE_EOS, BYTE_PAD) < BYTE_VOCABULARY


def test_a_tokenizer_file_encodes_and_decodes(tmp_path: Path) -> None:
    file = trained_file(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    tokenizer = load_tokenizer(file)
    ids = tokenizer.encode([TEXT, ""])
    assert len(ids[0]) < len(TEXT.encode()) and len(ids[1]) == 0
    assert tokenizer.decode([0, *ids[0].tolist(), 1]) == TEXT
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.vocab_size == 1 + max(json.loads(file.read_text())["model"]["vocab"].values())


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    file = trained_file(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(str(file)).fingerprint
    assert load_tokenizer(tmp_path).bos is None


def test_lengths_and_special_tokens_that_a_file_asks_for_do_not_touch_a_corpus(tmp_path: Path) -> None:
    plain = load_tokenizer(trained_file(tmp_path / "a.json", ["</s>"]))
    cutting = load_tokenizer(trained_file(tmp_path / "b.json", ["</s>"], truncate=True))
    assert cutting.encode([TEXT])[0].tolist() == plain.encode([TEXT])[0].tolist()


def test_the_token_that_ends_a_document_can_be_named(tmp_path: Path) -> None:
    file = trained_file(tmp_path / "tokenizer.json", ["[END]", "[OTHER]"])
    with pytest.raises(ConfigurationError, match=r"none of the usual tokens.*eos_token="):
        load_tokenizer(file)
    with pytest.raises(ConfigurationError, match=r"eos_token='\[STOP\]' is not in the vocabulary"):
        load_tokenizer(file, eos_token="[STOP]")
    first, second = (load_tokenizer(file, eos_token=token) for token in ("[END]", "[OTHER]"))
    assert (first.eos, second.eos) == (0, 1)
    assert first.fingerprint != second.fingerprint  # they make different caches


@pytest.mark.parametrize("content", [None, "", "{}", "not json", '{"model": 1}'])
def test_a_file_that_is_missing_or_no_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError, match=r"tokenizer=.*tokenizer\.json' (cannot be read|is not a tokenizer)"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigurationError, match=r"tokenizer=.*elsewhere'? cannot be read"):
        load_tokenizer(tmp_path / "elsewhere")


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    real = builtins.__import__

    def without_tokenizers(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ModuleNotFoundError("No module named 'tokenizers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(MissingPackageError, match=r"lightning-dualpipe\[hf\]"):
        load_tokenizer(tmp_path)
