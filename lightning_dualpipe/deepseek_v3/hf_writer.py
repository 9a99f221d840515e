"""Writing a model as a Hugging Face directory, part by part.

    parts of the model ──hf_names──► key, view ──safetensors_files──► shards, index, config.json

The parts come from anything that iterates over them: one process that holds the model, or a gather
from the ranks of a run, which may hand over a stack of experts some rows at a time. What is written
can be taken for a model only when everything is there: ``config.json`` comes last.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_config import config_to_hf, generation_config
from lightning_dualpipe.deepseek_v3.hf_names import (
    Part,
    copies,
    is_router_bias,
    pieces,
    shapes_by_key,
    shapes_without_numbers,
)
from lightning_dualpipe.deepseek_v3.safetensors_files import CONFIG, ShardWriter, size_in_bytes
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["FileDtype", "save_weights"]

FileDtype = Literal["bfloat16", "float32", "float64"]
"""Of the tensors in files. The router's bias is float32 in each."""


def save_weights(
    parts: Iterable[Part],
    config: DeepSeekV3Config,
    directory: str | Path,
    *,
    dtype: FileDtype = "bfloat16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    token_ids: Mapping[str, int | list[int] | None] | None = None,
) -> None:
    """Write ``parts``, in any order, each tensor once.

    Memory: one shard beside the parts. An interrupted export leaves what was in the directory.

    Raises:
        ConfigurationError: the directory holds a model and ``overwrite`` is off, or parts are missing at the end.
    """
    if dtype not in get_args(FileDtype):
        raise ConfigurationError(f"dtype={dtype!r} is not written; use one of {', '.join(get_args(FileDtype))}")
    awaited = shapes_by_key(config)
    with ShardWriter(Path(directory), size_in_bytes(max_shard_size), overwrite=overwrite) as writer:
        for key, tensor in _tensors(parts, config, awaited):
            writer.add(key, tensor, torch.float32 if is_router_bias(key) else getattr(torch, dtype))
        for key, shape in shapes_without_numbers(config).items():
            writer.add(key, torch.empty(shape), getattr(torch, dtype))
        if awaited:
            raise ConfigurationError(
                f"{len(awaited)} tensors are missing from what is to be exported ({', '.join(list(awaited)[:4])}, …); "
                "a rank of a parallel run holds only some of the layers and experts: gather the model first"
            )
        documents = {CONFIG: config_to_hf(config, dtype=dtype, token_ids=token_ids)}
        writer.publish({**documents, "generation_config.json": generation_config(token_ids or {})})


def _tensors(
    parts: Iterable[Part], config: DeepSeekV3Config, awaited: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors to write, copies included. Takes what comes out of ``awaited``."""
    for part in parts:
        for key, tensor in pieces(part, config):
            shape = awaited.pop(key, None)
            assert shape is not None, f"{part.name} gives {key}, which the model lacks or which was given before"
            assert tensor.shape == shape, f"{part.name} gives {key} with shape {list(tensor.shape)}, not {list(shape)}"
            yield key, tensor
        for key in copies(part.name, config):
            yield key, part.tensor
