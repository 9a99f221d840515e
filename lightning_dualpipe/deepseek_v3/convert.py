"""Models from and to Hugging Face directories.

    config = read_pretrained_config("DeepSeek-V3/")
    model = Transformer(config)
    load_pretrained(model, "DeepSeek-V3/")
    save_pretrained(model, "mine/", dtype="bfloat16")

Neither way holds the model twice: ``hf_reader`` fills tensors that exist already, ``hf_writer`` takes
the model in parts. What is read and written, and whose rules are followed where transformers and
DeepSeek's own code differ, is told in docs/interchange.md.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_config import TOKEN_IDS, config_from_hf, declared_mtp_layers
from lightning_dualpipe.deepseek_v3.hf_names import parts_of
from lightning_dualpipe.deepseek_v3.hf_reader import load_weights, mtp_layers_held
from lightning_dualpipe.deepseek_v3.hf_writer import FileDtype, save_weights
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.safetensors_files import CONFIG, read_json

__all__ = ["load_pretrained", "read_pretrained_config", "read_token_ids", "save_pretrained"]

_FREE = (  # settings of training, which say nothing about the weights
    *("initializer_range", "bias_update_speed", "aux_loss_alpha", "mtp_loss_weight", "num_nextn_predict_layers"),
)


def read_pretrained_config(directory: str | Path) -> DeepSeekV3Config:
    """The configuration of the model in ``directory``, with the multi-token prediction that its files hold.

    transformers drops those layers when it saves, and goes on declaring them.
    """
    settings = read_json(Path(directory) / CONFIG)
    config = config_from_hf(settings)
    held = mtp_layers_held(directory, config.num_hidden_layers)
    declared = declared_mtp_layers(settings)
    return replace(config, num_nextn_predict_layers=held if declared is None else min(declared, held))


def read_token_ids(directory: str | Path) -> dict[str, int | list[int] | None]:
    """Which tokens begin, end and pad a text for the model in ``directory``, to hand to ``save_pretrained``."""
    settings = read_json(Path(directory) / CONFIG)
    return {name: settings[name] for name in TOKEN_IDS if name in settings}


def load_pretrained(model: Transformer, directory: str | Path) -> None:
    """Fill ``model``, whole or what a rank holds of it, with the weights in ``directory``.

    Other shapes are an error. Other settings only warn, for they may be wanted: YaRN, for instance,
    to extend the context of weights that were trained without.
    """
    ours = model.config
    theirs = replace(read_pretrained_config(directory), **{name: getattr(ours, name) for name in _FREE})
    different = [
        f"{field.name}={getattr(ours, field.name)!r} (its config.json: {getattr(theirs, field.name)!r})"
        for field in fields(ours)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]
    load_weights(parts_of(model), directory, ours)
    if different:
        warnings.warn(f"{directory} was made with other settings: {', '.join(different)}", stacklevel=2)


def save_pretrained(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: FileDtype = "bfloat16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    token_ids: Mapping[str, int | list[int] | None] | None = None,
) -> None:
    """Write ``model``, which must be whole, as a directory that transformers and vLLM load."""
    save_weights(
        parts_of(model),
        model.config,
        directory,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        token_ids=token_ids,
    )
