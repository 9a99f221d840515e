"""Text for training: corpora, tokenizers, a token cache, packed sequences in a resumable order."""

from lightning_dualpipe.data.batches import BatchSizeRamp
from lightning_dualpipe.data.module import TextDataModule
from lightning_dualpipe.data.tokenizers import (
    BYTE_BOS,
    BYTE_EOS,
    BYTE_PAD,
    BYTE_VOCABULARY,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "BYTE_BOS",
    "BYTE_EOS",
    "BYTE_PAD",
    "BYTE_VOCABULARY",
    "BatchSizeRamp",
    "ByteTokenizer",
    "TextDataModule",
    "Tokenizer",
    "load_tokenizer",
]
