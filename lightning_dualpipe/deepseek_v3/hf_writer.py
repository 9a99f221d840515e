"""Writing a model as a Hugging Face directory, part by part.

    parts of the model ──hf_names──► key, view ──hf_fp8──► tensors ──safetensors_files──► shards, index, config.json

The parts come from anything that iterates over them: one process that holds the model, or a gather
from the ranks of a run, which may hand over a stack of experts some rows at a time. What is written
can be taken for a model only when everything is there: ``config.json`` comes last.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_config import config_to_hf, generation_config
from lightning_dualpipe.deepseek_v3.hf_fp8 import (
    QUANTIZATION_CONFIG,
    WEIGHT_OPERANDS,
    is_in_fp8,
    is_misread_by_transformers,
    quantise_weight,
    scale_key,
)
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

__all__ = ["FileDtype", "documents", "dtype_beside_fp8", "save_together", "save_weights", "warn_of_misreading"]

FileDtype = Literal["bfloat16", "float32", "float64", "float8_block", "float8_block_power_of_two"]
"""Of the tensors in files. The router's bias is float32 in each. ``float8_block`` is the released format: what
``hf_fp8.is_in_fp8`` names is E4M3 in blocks of 128 x 128 with float32 scales, or scales that are powers of two; the
rest is bfloat16."""


def save_weights(
    parts: Iterable[Part],
    config: DeepSeekV3Config,
    directory: str | Path,
    *,
    dtype: FileDtype = "bfloat16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    token_ids: Mapping[str, int | list[int] | None] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write ``parts``, in any order, each tensor once.

    Args:
        texts: files of the tokenizer by name, to go along.

    Memory: one shard beside the parts. An interrupted export leaves what was in the directory.

    Raises:
        ConfigurationError: the directory holds a model and ``overwrite`` is off, parts are missing at the end, or
            weights that are to be in FP8 are not finite.
    """
    dense = dtype_beside_fp8(dtype)
    awaited = shapes_by_key(config)
    with ShardWriter(Path(directory), size_in_bytes(max_shard_size), overwrite=overwrite) as writer:
        for key, tensor in _tensors(parts, config, awaited):
            if dtype in WEIGHT_OPERANDS and is_in_fp8(key):
                values, scales = quantise_weight(key, tensor, WEIGHT_OPERANDS[dtype])
                writer.add(key, values, values.dtype)
                writer.add(scale_key(key), scales, scales.dtype)
            else:
                writer.add(key, tensor, torch.float32 if is_router_bias(key) else dense)
        for key, shape in shapes_without_numbers(config).items():
            writer.add(key, torch.empty(shape), dense)
        if awaited:
            raise ConfigurationError(
                f"{len(awaited)} tensors are missing from what is to be exported ({', '.join(list(awaited)[:4])}, …); "
                "a rank of a parallel run holds only some of the layers and experts: gather the model first"
            )
        writer.publish(documents(config, dtype, token_ids or {}, texts or {}))
    warn_of_misreading(config, dtype, directory)


def documents(
    config: DeepSeekV3Config, dtype: FileDtype, token_ids: Mapping[str, Any], texts: Mapping[str, str]
) -> dict[str, Mapping[str, Any] | str]:
    """All files of a directory but those of tensors and their index, by name."""
    settings = config_to_hf(
        config,
        dtype=str(dtype_beside_fp8(dtype)).removeprefix("torch."),
        token_ids=token_ids,
        quantization=QUANTIZATION_CONFIG if dtype in WEIGHT_OPERANDS else None,
    )
    return {**texts, "generation_config.json": generation_config(token_ids), CONFIG: settings}


def warn_of_misreading(config: DeepSeekV3Config, dtype: FileDtype, directory: str | Path) -> None:
    """Of FP8 that transformers takes for other numbers."""
    if dtype not in WEIGHT_OPERANDS:
        return
    shapes = shapes_by_key(config).items()
    misread = [key for key, shape in shapes if is_in_fp8(key) and is_misread_by_transformers(shape)]
    if misread:
        warnings.warn(
            f"transformers (5.23) reads {len(misread)} weights in {directory} wrongly and does not say so: the blocks "
            f"at the edges of {', '.join(misread[:2])}, … are smaller than 128 x 128. This package reads them right; "
            "for transformers write dtype='bfloat16', or choose sizes that are multiples of 128",
            stacklevel=3,
        )


def dtype_beside_fp8(dtype: FileDtype) -> torch.dtype:
    """Of what is not quantised, the router's bias apart.

    Raises:
        ConfigurationError: not a ``FileDtype``.
    """
    if dtype not in get_args(FileDtype):
        raise ConfigurationError(f"dtype={dtype!r} is not written; use one of {', '.join(get_args(FileDtype))}")
    return torch.bfloat16 if dtype in WEIGHT_OPERANDS else getattr(torch, dtype)


def save_together(
    parts: Iterable[Part],
    config: DeepSeekV3Config,
    directory: str | Path,
    *,
    writes: bool,
    agree: Callable[[Exception | None], Exception | None],
    **how: Any,
) -> None:
    """``save_weights`` by one of several ranks, all of which call this and iterate over their ``parts``.

    Args:
        writes: whether this rank is the one.
        agree: returns on every rank what the one that writes has given it.
        how: arguments of ``save_weights``.

    Raises:
        Exception: on every rank, what kept the one from writing.
    """
    problem: Exception | None = None
    if writes:
        try:
            save_weights(parts, config, directory, **how)
        except Exception as error:
            problem = error
    deque(parts, maxlen=0)  # send what this rank holds, or let the others send it
    if (problem := agree(problem)) is not None:
        raise problem


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
