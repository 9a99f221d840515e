"""What a LightningDataModule says about its tokens, and whether a model can take them.

Any data module says it by attributes named as ``TextDataModule``'s: ``vocab_size``, ``sequence_length``,
and a ``tokenizer`` with ``bos``, ``eos``, ``pad`` and ``files``. What one does not say is not checked, and not known.
"""

from collections.abc import Mapping

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_config import TOKEN_IDS
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["TokenIds", "check_data", "check_token_ids", "token_ids_of", "tokenizer_files_of"]

TokenIds = dict[str, int | list[int] | None]
"""Any of ``hf_config.TOKEN_IDS``."""


def check_data(config: DeepSeekV3Config, data: object) -> None:
    """
    Raises:
        ConfigurationError: token ids without an embedding, or positions that the model was not made for.
    """
    problems = []
    vocabulary, length = getattr(data, "vocab_size", None), getattr(data, "sequence_length", None)
    if isinstance(vocabulary, int) and vocabulary > config.vocab_size:
        problems.append(
            f"the tokenizer has {vocabulary} ids, the model vocab_size={config.vocab_size}: take the tokenizer that "
            f"the model was trained with, or for a new model overrides={{'vocab_size': {vocabulary}}}"
        )
    if isinstance(length, int) and length > config.max_position_embeddings:
        problems.append(
            f"sequence_length={length} exceeds max_position_embeddings={config.max_position_embeddings}: take shorter "
            f"sequences, or overrides={{'max_position_embeddings': {length}}}"
        )
    if problems:
        raise ConfigurationError.of("the model cannot be used with these data", problems)


def token_ids_of(data: object) -> TokenIds:
    """Which tokens begin, end and pad a text of ``data``, by the names they have in ``config.json``."""
    tokenizer = getattr(data, "tokenizer", None)
    found = {name: getattr(tokenizer, name.removesuffix("_token_id"), None) for name in TOKEN_IDS}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def tokenizer_files_of(data: object) -> dict[str, str]:
    """What Hugging Face's libraries read the tokenizer of ``data`` from; nothing if it does not say."""
    found = getattr(getattr(data, "tokenizer", None), "files", None)
    return dict(found) if isinstance(found, Mapping) else {}


def check_token_ids(token_ids: Mapping[str, object]) -> None:
    """
    Raises:
        ConfigurationError: it names a token that ``config.json`` does not.
    """
    if unknown := [name for name in token_ids if name not in TOKEN_IDS]:
        raise ConfigurationError(f"token_ids names {', '.join(unknown)}; the names are {', '.join(TOKEN_IDS)}")
