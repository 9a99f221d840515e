"""What an export will write, told beforehand: files, tensors, bytes. Nothing is allocated.

plan = export_plan(DeepSeekV3Config.from_preset("671b"), dtype="float8_block")
sum(file.size for file in plan)  # 688,574,839,360 bytes; in bfloat16 1,368,979,721,216
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_fp8 import WEIGHT_OPERANDS, is_in_fp8, scale_key, scale_shape
from lightning_dualpipe.deepseek_v3.hf_names import copies, is_router_bias, parts_of, pieces, shapes_without_numbers
from lightning_dualpipe.deepseek_v3.hf_writer import FileDtype, dtype_beside_fp8
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.safetensors_files import begins_a_file, file_names, size_in_bytes

__all__ = ["PlannedFile", "PlannedTensor", "Source", "export_plan"]


@dataclass(frozen=True, slots=True)
class Source:
    """Elements of our tensor ``name`` that one of the files' is made of: ``shape``, from number ``start`` on."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """``source`` is None of tensors without numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Source | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedFile:
    name: str
    tensors: Mapping[str, PlannedTensor]

    @property
    def size(self) -> int:
        """Bytes of its tensors; the header that lists them comes on top."""
        return sum(tensor.size for tensor in self.tensors.values())


def export_plan(
    config: DeepSeekV3Config, *, dtype: FileDtype = "bfloat16", max_shard_size: int | str = "5GB"
) -> list[PlannedFile]:
    """The safetensors files of a model, as one process that holds it writes them.

    Ranks of a run hand over the same tensors in another order, so they may lie in other files.

    Raises:
        ConfigurationError: not a ``dtype`` or a size that exports have.
    """
    most, filled = size_in_bytes(max_shard_size), 0
    files: list[dict[str, PlannedTensor]] = []
    for key, tensor in _tensors(config, dtype):
        if not files or begins_a_file(filled, tensor.size, most):
            files.append({})
            filled = 0
        files[-1][key] = tensor
        filled += tensor.size
    return [PlannedFile(name, tensors) for name, tensors in zip(file_names(len(files)), files, strict=True)]


def _tensors(config: DeepSeekV3Config, dtype: FileDtype) -> Iterator[tuple[str, PlannedTensor]]:
    """In the order of ``hf_writer.save_weights``."""
    dense = dtype_beside_fp8(dtype)
    for key, source in _sources(config):
        shape = source.shape
        if dtype in WEIGHT_OPERANDS and is_in_fp8(key):
            yield key, PlannedTensor(shape, torch.float8_e4m3fn, source)
            yield scale_key(key), PlannedTensor(scale_shape(shape), torch.float32, source)
        else:
            yield key, PlannedTensor(shape, torch.float32 if is_router_bias(key) else dense, source)
    for key, shape in shapes_without_numbers(config).items():
        yield key, PlannedTensor(shape, dense)


def _sources(config: DeepSeekV3Config) -> Iterator[tuple[str, Source]]:
    with torch.device("meta"), torch.no_grad():
        model = Transformer(config)
        for part in parts_of(model):
            for key, view in pieces(part, config):
                yield key, Source(part.name, int(view.storage_offset()), tuple(view.shape))
            for key in copies(part.name, config):
                yield key, Source(part.name, 0, tuple(part.tensor.shape))
