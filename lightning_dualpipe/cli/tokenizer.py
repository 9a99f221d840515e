"""Which tokenizer a command takes: the one that ``--tokenizer`` names, else that of the model's training."""

from pathlib import Path

from lightning_dualpipe.data.tokenizers import BYTE_BOS, BYTE_EOS, Tokenizer, load_tokenizer
from lightning_dualpipe.deepseek_v3.module import DeepSeekV3
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["named_tokenizer", "tokenizer_of"]

_BYTES = "bytes"


def named_tokenizer(name: str | Path, *, eos_token: str | None = None) -> Tokenizer:
    """A ``tokenizer.json``, a folder with one, or ``"bytes"``.

    Raises:
        ConfigurationError: there is none, or it has no such token.
        MissingPackageError: the package ``tokenizers`` is not installed.
    """
    return load_tokenizer(None if name == _BYTES else name, eos_token=eos_token)


def tokenizer_of(
    module: DeepSeekV3, source: Path, *, named: str | None = None, eos_token: str | None = None
) -> Tokenizer:
    """What makes the ids that ``module``, opened from ``source``, was trained on.

    Args:
        named: what takes the place of the module's own.

    Raises:
        ConfigurationError: nobody says which one it is, or it has ids that the model does not know.
        MissingPackageError: the package ``tokenizers`` is not installed.
    """
    token_ids = module.hparams["token_ids"] or {}
    bos, eos = (_first(token_ids.get(name)) for name in ("bos_token_id", "eos_token_id"))
    if named is not None:
        tokenizer = named_tokenizer(named, eos_token=eos_token)
    elif "tokenizer.json" in module.tokenizer_files:
        tokenizer = load_tokenizer(source, eos_token=eos_token, eos_id=eos, files=module.tokenizer_files)
    elif eos == BYTE_EOS and bos in (None, BYTE_BOS):  # of a time when files of bytes were not kept
        tokenizer = load_tokenizer()
    else:
        raise ConfigurationError(
            f"{source} does not say which tokenizer it was trained with: give it by --tokenizer ({_BYTES}, or a "
            "tokenizer.json)"
        )
    if tokenizer.vocab_size > module.config.vocab_size:
        raise ConfigurationError(
            f"the tokenizer {named or f'of {source}'} has {tokenizer.vocab_size} ids, the model "
            f"vocab_size={module.config.vocab_size}: give the one that the model was trained with by --tokenizer"
        )
    return tokenizer


def _first(id: int | list[int] | None) -> int | None:
    return (id[0] if id else None) if isinstance(id, list) else id
