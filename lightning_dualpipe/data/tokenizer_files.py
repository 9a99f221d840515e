"""Tokenizers of the Hugging Face ``tokenizers`` package; the only file that imports it."""

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.interface import TOKENIZER_FILES

__all__ = ["FileTokenizer"]

_FILE = "tokenizer.json"
EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>", "[EOS]")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<bos>", "[BOS]")
"""Names under which models publish these tokens; ``tokenizer.json`` itself does not say which they are."""


class FileTokenizer:
    """A ``tokenizer.json``, whatever its kind (BPE, unigram, word piece)."""

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        eos_token: str | None = None,
        eos_id: int | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """As ``load_tokenizer``."""
        path = Path(os.path.expanduser(file))
        path = path / _FILE if files is None and path.is_dir() else path
        content = _read(path) if files is None else files[_FILE].encode()
        self._tokenizer = _parse(content, path)
        self.files = _with_those_beside(path, content) if files is None else dict(files)
        # what a file says about the length of inputs is for inference; a corpus is taken whole
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos = _eos(vocabulary, eos_token, eos_id, path)
        bos = next((vocabulary[name] for name in BOS_NAMES if name in vocabulary), None)
        self.bos = None if bos == self.eos else bos
        self.fingerprint = f"{sha256(content).hexdigest()}, bos {self.bos}, eos {self.eos}"

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"tokenizer={str(path)!r} cannot be read ({error.strerror}): give a Hugging Face tokenizer.json, a folder "
            "with one, or no tokenizer for bytes"
        ) from None


def _with_those_beside(path: Path, content: bytes) -> dict[str, str]:
    """A folder that was published has more to say about its tokenizer."""
    beside = [path.with_name(name) for name in TOKENIZER_FILES if name != _FILE]
    return {_FILE: content.decode()} | {each.name: _read(each).decode() for each in beside if each.is_file()}


def _parse(content: bytes, path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError(
            f"tokenizer={str(path)!r} needs the package tokenizers: pip install 'lightning-dualpipe[hf]'; "
            "without a tokenizer, text is read as bytes"
        ) from error
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing narrower
        raise ConfigurationError(
            f"tokenizer={str(path)!r} is not a tokenizer file of Hugging Face's tokenizers package: {error}"
        ) from None


def _eos(vocabulary: dict[str, int], eos_token: str | None, eos_id: int | None, path: Path) -> int:
    if eos_token is not None and eos_token not in vocabulary:
        raise ConfigurationError(f"eos_token={eos_token!r} is not in the vocabulary of tokenizer={str(path)!r}")
    if eos_token is None and eos_id is not None and eos_id in vocabulary.values():
        return eos_id
    names = EOS_NAMES if eos_token is None else (eos_token,)
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise ConfigurationError(
        f"tokenizer={str(path)!r} has none of the usual tokens that end a document ({' '.join(EOS_NAMES)}); "
        "name one by eos_token=… (--eos-token)"
    )
