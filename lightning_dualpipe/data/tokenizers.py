"""From text to token ids.

The default needs no file and no package: the ids 0..255 are the bytes of UTF-8, followed by three
special tokens. 264 leaves room for five more and is what the ``tiny`` preset takes as its vocabulary.

Each document is stored as  bos, tokens, eos  (without bos where a tokenizer has none), and documents
follow each other without padding; attention may look across (arXiv:2412.19437, section 4.1).
"""

import os
from collections.abc import Sequence
from typing import Protocol

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

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id for id in ids if id < NUM_BYTES).decode(errors="replace")


def load_tokenizer(file: str | os.PathLike[str] | None = None, *, eos_token: str | None = None) -> Tokenizer:
    """Bytes, or a Hugging Face ``tokenizer.json`` (or a folder with one).

    ``eos_token`` names the token that ends a document where its name is not one of the usual ones.

    Raises:
        ConfigurationError: the file is missing or no tokenizer, or has no such token.
        MissingPackageError: a file is given and the package ``tokenizers`` is not installed.
    """
    if file is None:
        return ByteTokenizer()
    from lightning_dualpipe.data.tokenizer_files import FileTokenizer

    return FileTokenizer(file, eos_token=eos_token)
