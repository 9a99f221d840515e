"""Tokenizer files of a Hugging Face directory, so that readers turn text into the ids that the model was trained on.

    tokenizer.json            the tokenizer; with what begins a text: documents of a training begin with bos
    tokenizer_config.json     which tokens are special, how long a text may be
    chat_template.jinja       how a conversation becomes one text

A tokenizer that came with its ``tokenizer_config.json`` is somebody's published one, and goes out as it came in.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import TOKENIZER_FILES

__all__ = ["CHAT_TEMPLATE", "largest_token_id", "read_tokenizer_files", "served_tokenizer_files"]

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_REMEDY = "copy it again from where it came"
CHAT_TEMPLATE = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}
"""
"""Names who speaks, no more: no conversations were trained on. For a model that was, put its own template there."""


def read_tokenizer_files(directory: Path) -> dict[str, str]:
    """Text of the tokenizer files in ``directory`` by name; none if there is no ``tokenizer.json``.

    Raises:
        ConfigurationError: one cannot be read, or is not what its name says.
    """
    if not (directory / TOKENIZER).is_file():
        return {}
    found, parsed = {}, {}
    for name in TOKENIZER_FILES:
        try:
            found[name] = (directory / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{directory / name} cannot be read ({error}); {_REMEDY}") from None
        if name.endswith(".json"):
            parsed[name] = _object(found[name], directory / name)
    _vocabulary(parsed[TOKENIZER], directory / TOKENIZER)
    return found


def served_tokenizer_files(
    files: Mapping[str, str], token_ids: Mapping[str, int | list[int] | None], *, longest: int
) -> dict[str, str]:
    """``files`` of a training's tokenizer, and what readers need besides.

    Args:
        files: text by file name.
        token_ids: any of ``hf_config.TOKEN_IDS``.
        longest: tokens that the model was made for.
    """
    if TOKENIZER not in files or SETTINGS in files:
        return dict(files)
    tokenizer = _object(files[TOKENIZER], TOKENIZER)
    names = {id: name for name, id in _vocabulary(tokenizer, TOKENIZER).items()}
    special = {
        name.removesuffix("_id"): names[id]
        for name, given in token_ids.items()
        if (id := given[0] if isinstance(given, list) and given else given) in names
    }
    bos = special.get("bos_token")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    # A corpus is encoded without what a file cuts, fills up and adds; then each document gets bos in front.
    tokenizer |= {"truncation": None, "padding": None, "post_processor": bos and _in_front(bos, token_ids)}
    return {
        TEMPLATE: CHAT_TEMPLATE,
        **files,
        TOKENIZER: json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n",
        SETTINGS: json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
    }


def largest_token_id(tokenizer_json: str, source: str | Path = TOKENIZER) -> int:
    """Of the text of a ``tokenizer.json``, which is in ``source``.

    Raises:
        ConfigurationError: it is none.
    """
    return max(_vocabulary(_object(tokenizer_json, source), source).values())


def _object(text: str, source: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{source} is no JSON ({error}); {_REMEDY}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{source} is no JSON object; {_REMEDY}")
    return found


def _vocabulary(tokenizer: Mapping[str, Any], source: str | Path) -> dict[str, int]:
    """All tokens, of a vocabulary that has their ids or (unigrams) their order only."""
    try:
        held = tokenizer["model"]["vocab"] or {}
        found = dict(held) if isinstance(held, dict) else {piece: id for id, (piece, _) in enumerate(held)}
        found |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    except (AttributeError, KeyError, TypeError, ValueError):
        found = {}
    if not found or not all(isinstance(id, int) and id >= 0 for id in found.values()):
        raise ConfigurationError(
            f"{source} is no tokenizer of Hugging Face's tokenizers package: it has no vocabulary with ids; {_REMEDY}"
        )
    return found


def _in_front(bos: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    given = token_ids["bos_token_id"]
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text, second],
        "special_tokens": {bos: {"id": bos, "ids": [given[0] if isinstance(given, list) else given], "tokens": [bos]}},
    }
