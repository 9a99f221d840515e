"""From text to token ids.

The default needs no file and no package: the ids 0..255 are the bytes of UTF-8, followed by three
special tokens. 264 leaves room for five more and is what the ``tiny`` preset takes as its vocabulary.

Each document is stored as  bos, tokens, eos  (without bos where a tokenizer has none), and documents
follow each other without padding; attention may look across (arXiv:2412.19437, section 4.1).
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "BYTE_BOS",
    "BYTE_EOS",
    "BYTE_PAD",
    "BYTE_VOCABULARY",
    "NUM_BYTES",
    "ByteTokenizer",
    "Tokenizer",
    "load_tokenizer",
]

NUM_BYTES = 256
BYTE_BOS = 256
BYTE_EOS = 257
BYTE_PAD = 258
BYTE_VOCABULARY = 264
"""Ids that a model of bytes provides for: 256 bytes, three special tokens, five unused."""


class Tokenizer(Protocol):
    """What data and generation ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos(self) -> int | None:
        """Begins a document."""
        ...

    @property
    def eos(self) -> int:
        """Ends a document."""
        ...

    @property
    def files(self) -> Mapping[str, str]:
        """What Hugging Face's libraries read it from: text by name, any of ``interface.TOKENIZER_FILES``."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that make equal ids of equal text."""
        ...

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        """The ids of each text, special tokens not added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8."""

    vocab_size = BYTE_VOCABULARY
    bos = BYTE_BOS
    eos = BYTE_EOS
    pad = BYTE_PAD
    fingerprint = f"utf-8 bytes, bos {BYTE_BOS}, eos {BYTE_EOS}"

    @cached_property
    def files(self) -> Mapping[str, str]:
        return {"tokenizer.json": json.dumps(_bytes_as_bpe(), ensure_ascii=False, indent=1) + "\n"}

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id for id in ids if id < NUM_BYTES).decode(errors="replace")


def load_tokenizer(
    file: str | os.PathLike[str] | None = None,
    *,
    eos_token: str | None = None,
    eos_id: int | None = None,
    files: Mapping[str, str] | None = None,
) -> Tokenizer:
    """Bytes, or a Hugging Face ``tokenizer.json`` (or a folder with one). An exported one of bytes is bytes again.

    Args:
        eos_token: names the token that ends a document where its name is not one of the usual ones.
        eos_id: its id for the model, which counts where ``eos_token`` does not say.
        files: text by name of what was read already, from a checkpoint for instance: ``file`` is where from.

    Raises:
        ConfigurationError: the file is missing or no tokenizer, or has no such token.
        MissingPackageError: a file is given and the package ``tokenizers`` is not installed.
    """
    if file is None or (eos_token is None and _is_of_bytes(Path(os.path.expanduser(file)), files)):
        return ByteTokenizer()
    from lightning_dualpipe.data.tokenizer_files import FileTokenizer

    return FileTokenizer(file, eos_token=eos_token, eos_id=eos_id, files=files)


_SPECIAL = {
    BYTE_BOS: "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    BYTE_EOS: "<\uff5cend\u2581of\u2581sentence\uff5c>",
    BYTE_PAD: "<\uff5c\u2581pad\u2581\uff5c>",
    **{id: f"<\uff5cplace\u2581holder\u2581no\u2581{id}\uff5c>" for id in range(BYTE_PAD + 1, BYTE_VOCABULARY)},
}
"""DeepSeek's names, which no text has by accident. A reader takes a text that spells one for that token."""


def _bytes_as_bpe() -> dict[str, Any]:
    """As a ``tokenizer.json``: a byte-level BPE that merges nothing, whose ids are the bytes."""
    whole = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **plain} for id, name in _SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **whole},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **whole},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """What byte-level tokenizers write for each byte: itself where it prints, else the next of those from U+0100 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(NUM_BYTES)]


def _is_of_bytes(path: Path, files: Mapping[str, str] | None) -> bool:
    """Whether this is what an export wrote of ``ByteTokenizer``: for that, nothing needs to be installed."""
    try:
        if files is not None:
            text = files["tokenizer.json"]
        else:
            text = (path / "tokenizer.json" if path.is_dir() else path).read_text(encoding="utf-8")
        return {**json.loads(text), "post_processor": None} == _bytes_as_bpe()
    except (OSError, TypeError, ValueError):
        return False
