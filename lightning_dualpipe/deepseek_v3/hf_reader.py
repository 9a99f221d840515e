"""Filling a model from a Hugging Face directory, tensor by tensor.

    directory ──safetensors_files──► key, tensor ──hf_names──► region of a tensor of ours, copy_

The tensors to fill exist already and say what is wanted: all of a model, or the layers and experts
of one rank. Everything is checked before the first value is written, and every problem is told.

Matrices in FP8 are dequantised (``hf_fp8``), whatever the size of their blocks. Their scales may lie
in another file than the values.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_fp8 import dequantise, scale_key, scale_shape
from lightning_dualpipe.deepseek_v3.hf_names import (
    Part,
    copies,
    key_of,
    mtp_projection,
    pieces,
    shapes_by_key,
    shapes_without_numbers,
)
from lightning_dualpipe.deepseek_v3.safetensors_files import TensorReader, read_json
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["load_weights", "mtp_layers_held"]

_PLAIN = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_SCALES = ("F32", "F64", "BF16", "F16", "F8_E8M0")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
_ROWS_AT_ONCE = 4096


def load_weights(parts: Iterable[Part], directory: str | Path, config: DeepSeekV3Config) -> None:
    """Copy the weights in ``directory`` into ``parts``, converted to each tensor's dtype.

    Memory: one tensor of the files beside the parts. Multi-token prediction layers that ``config``
    does not count are left alone.

    Raises:
        ConfigurationError: tensors missing, unknown, of another shape or unreadable; the parts are unchanged.
    """
    targets = _targets(parts, config)
    with TensorReader(Path(directory)) as reader:
        block = _block_size(Path(directory))
        problems = [
            *_missing(targets, reader),
            *_unexpected(reader, config),
            *_misfits(targets, reader, block),
            *_copies_that_differ(targets, reader, config),
        ]
        if problems:
            raise ConfigurationError.of(f"the weights in {directory} do not fit the model", problems)
        for key in reader.in_file_order(targets):
            tensor = _read(reader, key, block)
            for target in targets[key]:
                target.copy_(tensor)


def mtp_layers_held(directory: str | Path, num_hidden_layers: int) -> int:
    """Depths of multi-token prediction whose weights are in ``directory``."""
    with TensorReader(Path(directory)) as reader:
        depth = 0
        while mtp_projection(num_hidden_layers + depth) in reader:
            depth += 1
        return depth


def _targets(parts: Iterable[Part], config: DeepSeekV3Config) -> dict[str, list[Tensor]]:
    """For every tensor of the files that is wanted, the regions of ours that it fills."""
    targets: dict[str, list[Tensor]] = {}
    for part in parts:
        assert part.tensor.device.type != "meta", f"{part.name} has no memory; materialise the model first"
        for key, tensor in pieces(part, config):
            targets.setdefault(key, []).append(tensor.detach())
    return targets


def _block_size(directory: Path) -> tuple[int, int]:
    config = directory / "config.json"
    quantization = read_json(config).get("quantization_config") if config.exists() else None
    rows, columns = (quantization or {}).get("weight_block_size") or (128, 128)
    return rows, columns


def _missing(targets: Mapping[str, list[Tensor]], reader: TensorReader) -> Iterator[str]:
    missing = [key for key in targets if key not in reader]
    if missing:
        mtp = any(key.endswith("eh_proj.weight") for key in missing)
        remedy = "; if the files hold no multi-token prediction, set num_nextn_predict_layers=0" if mtp else ""
        yield _listed("missing from the files", missing) + remedy


def _unexpected(reader: TensorReader, config: DeepSeekV3Config) -> Iterator[str]:
    known = shapes_by_key(config)
    unexpected = [key for key in reader if key not in known and not _needless(key, known, reader, config)]
    if unexpected:
        yield _listed("in the files and not in the model", unexpected)


def _needless(key: str, known: Container[str], reader: TensorReader, config: DeepSeekV3Config) -> bool:
    """Whether files may hold ``key`` although no tensor of the model is made of it."""
    if (
        key.removesuffix(scale_key("")) in known
        or key.endswith(".rotary_emb.inv_freq")  # written by old versions of transformers
        or (key == "lm_head.weight" and config.tie_word_embeddings)
        or shapes_without_numbers(config).get(key) == reader.spec(key)[1]
    ):
        return True
    layer = _LAYER.match(key)
    depth = int(layer[1]) - config.num_hidden_layers if layer else -1
    if depth < 0 or mtp_projection(config.num_hidden_layers + depth) not in reader:
        return False
    return depth >= config.num_nextn_predict_layers or key.endswith(_COPIES)


def _misfits(targets: Mapping[str, list[Tensor]], reader: TensorReader, block: tuple[int, int]) -> Iterator[str]:
    shapes: list[str] = []
    dtypes: list[str] = []
    doubtful: list[str] = []
    for key in reader.in_file_order(key for key in targets if key in reader):
        dtype, shape = reader.spec(key)
        ours = tuple(targets[key][0].shape)
        if shape != ours:
            shapes.append(f"{key} is {list(shape)} in the files and {list(ours)} in the model")
        elif dtype == _FP8:
            dtypes += _scale_problems(key, shape, reader, block)
        elif dtype not in _PLAIN:
            dtypes.append(f"{key} is {dtype}")
        elif scale_key(key) in reader:
            doubtful.append(f"{key} is {dtype}")
    if shapes:
        yield _listed("of another shape", shapes)
    if dtypes:
        yield _listed(f"in a format that is not read ({', '.join(_PLAIN)}, and {_FP8} with block scales, are)", dtypes)
    if doubtful:
        remedy = f"; convert the {_FP8} files again, or remove the scales if they have been multiplied in"
        yield _listed("with FP8 scales beside them that are not in FP8", doubtful) + remedy


def _scale_problems(key: str, shape: tuple[int, ...], reader: TensorReader, block: tuple[int, int]) -> Iterator[str]:
    scale = scale_key(key)
    if scale not in reader:
        yield f"{key} is {_FP8} without {scale}"
        return
    dtype, held = reader.spec(scale)
    wanted = scale_shape(shape, block)
    if len(shape) != 2 or held != wanted:
        yield f"{scale} is {list(held)}, blocks of {list(block)} need {list(wanted)}"
    elif dtype not in _SCALES:
        yield f"{scale} is {dtype}, scales are {', '.join(_SCALES)}"
    elif not reader.read(scale).float().isfinite().all():
        yield f"{scale} holds NaN or infinity"


def _copies_that_differ(
    targets: Mapping[str, list[Tensor]], reader: TensorReader, config: DeepSeekV3Config
) -> Iterator[str]:
    """A model with one embedding and head cannot hold what a file has two of."""
    different = []
    for name in ("embed_tokens.weight", "lm_head.weight"):
        main = key_of(name, config)
        for copy in copies(name, config):
            if main in targets and main in reader and copy in reader and not _equal(main, copy, reader):
                different.append(f"{copy} differs from {main}")
    if different:
        yield (
            _listed("copies of the embedding or head that are none", different)
            + "; depths of prediction share both here: set num_nextn_predict_layers=0 to import without them"
        )


def _equal(first: str, second: str, reader: TensorReader) -> bool:
    shape = reader.spec(first)[1]
    if reader.spec(second)[1] != shape:
        return False
    for start in range(0, shape[0], _ROWS_AT_ONCE):
        rows, others = (reader.read_rows(key, start, start + _ROWS_AT_ONCE) for key in (first, second))
        if not torch.equal(rows, others.to(rows.dtype)):
            return False
    return True


def _read(reader: TensorReader, key: str, block: tuple[int, int]) -> Tensor:
    tensor = reader.read(key)
    return dequantise(tensor, reader.read(scale_key(key)), block) if tensor.dtype == torch.float8_e4m3fn else tensor


def _listed(what: str, items: list[str], *, shown: int = 4) -> str:
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {'tensor' if len(items) == 1 else 'tensors'} {what}: {', '.join(items[:shown])}{more}"
