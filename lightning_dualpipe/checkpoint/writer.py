"""All ranks write their pieces of a checkpoint directory, each into a file of its own: nothing is collected.

    save(pieces, ...)   every rank, together
        plan      rank 0 makes the directory in which all write
        write     each rank: a block, its SHA-256, the next block; at most one block is in host memory
        finish    rank 0, when all have written: index, state and manifest; the directory takes its place

Through ``torch.distributed.checkpoint``, whose planner and storage interfaces these are. Its own files are
not used: their metadata is a pickle, and a flipped bit in a shard is loaded as if nothing were (2.13).
"""

import io
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lightning_dualpipe.checkpoint.directory import put_in_place, remove_remains, staging
from lightning_dualpipe.checkpoint.failures import first_failure
from lightning_dualpipe.checkpoint.index import DTYPES, Block, Entry, Index, Key
from lightning_dualpipe.checkpoint.manifest import INDEX, STATE, FileRecord, Manifest, write_durably
from lightning_dualpipe.checkpoint.writing import writing
from lightning_dualpipe.errors import CheckpointError, ConfigurationError

__all__ = ["Contents", "Piece", "save"]

_BLOCK_BYTES = 64 * 2**20  # what is in host memory at once, and the least that is read for one element


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank has of a tensor of the whole model: ``values``, its flat elements from ``start`` on.

    Args:
        shape: of the whole tensor.
        sparse: elements that nobody has are zeros.
        steady: between two steps of the optimizer nobody writes to ``values``.
    """

    key: Key
    shape: tuple[int, ...]
    start: int
    values: Tensor
    sparse: bool = False
    steady: bool = False

    def cuts(self, block_bytes: int) -> Iterator[tuple[int, int]]:
        """Whole rows (experts) where they are small enough, so that who loads some reads no others."""
        row = self.values.numel() and torch.Size(self.shape[1:]).numel()
        most = max(1, block_bytes // self.values.element_size())
        step = most // row * row if 0 < row <= most else most
        start, end = self.start, self.start + self.values.numel()
        while start < end:
            stop = min(end, (start // step + 1) * step)
            yield start, stop
            start = stop


@dataclass(frozen=True, slots=True)
class Contents:
    """What rank 0 knows of the whole.

    Args:
        state: all that is no piece; must be readable with ``weights_only``. Or what ``packed`` makes of it.
        names: name in the state dict -> the name under which its tensor is stored.
    """

    state: Mapping[str, Any] | bytes
    names: Mapping[str, str]
    step: int
    written_by: str

    def packed(self) -> "Contents":
        """The state as it is now, in bytes.

        Raises:
            ConfigurationError: loading it would need to run code.
        """
        return self if isinstance(self.state, bytes) else replace(self, state=_packed(self.state))


def save(
    pieces: Iterable[Piece], contents: Contents, target: Path, group: dist.ProcessGroup | None, *, rank: int
) -> None:
    """Write what all ranks have. A collective; returns when ``target`` is on the disk, whole.

    Args:
        pieces: asked for once. If that raises, all ranks do.
        contents: counts on rank 0.
        group: all ranks, on the host; None if there is one.

    Raises:
        CheckpointError: a rank could not write. What was there before still is.
        ConfigurationError: the state cannot be read again.
    """
    planner, writer = _Planner(pieces), _Writer(contents, target, rank)
    try:
        if group is not None:
            dcp.save({}, storage_writer=writer, planner=planner, process_group=group)
        else:
            _save_alone(planner, writer)
    except BaseException as error:
        failure = first_failure(error)
        if rank == 0 and writer.directory is not None:
            shutil.rmtree(writer.directory, ignore_errors=True)
        if isinstance(failure, OSError):
            raise CheckpointError(
                f"{target} cannot be written: {failure}. Nothing that was saved before was touched; free space or "
                "change the directory, and go on from the last checkpoint"
            ) from None
        raise failure from None


def _save_alone(planner: "_Planner", writer: "_Writer") -> None:
    """As ``torch.distributed.checkpoint.save``, which warns where there is no process group."""
    planner.set_up_planner({}, None, True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


class _Planner(SavePlanner):
    """Every piece in blocks; each tensor of the whole as one line of elements."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = pieces
        self._values: dict[MetadataIndex, tuple[Piece, int, int]] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._values.clear()

    def create_local_plan(self) -> SavePlan:
        items, pieces = [], tuple(self._pieces)
        for piece in pieces:
            if piece.values.dtype not in DTYPES:
                raise ConfigurationError(
                    f"{piece.key} is of {piece.values.dtype}, which a checkpoint directory cannot hold; "
                    "save one file: save_distributed_checkpoint=False"
                )
            for start, stop in piece.cuts(_BLOCK_BYTES):
                index = MetadataIndex(str(piece.key), (start,))
                chunk = ChunkStorageMetadata(torch.Size((start,)), torch.Size((stop - start,)))
                size, properties = torch.Size(piece.shape).numel(), TensorProperties(dtype=piece.values.dtype)
                data = TensorWriteData(chunk, properties, torch.Size((size,)))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._values[index] = (piece, start, stop)
        described = {str(p.key): (p.key, p.shape, p.values.dtype, p.sparse) for p in pieces}
        return SavePlan(items, planner_data=described)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        described: dict[str, tuple[Key, tuple[int, ...], torch.dtype, bool]] = {}
        for plan in all_plans:
            for name, about in plan.planner_data.items():
                if described.setdefault(name, about) != about:
                    raise CheckpointError(f"ranks disagree about {name}: {described[name][1:]} and {about[1:]}")
        chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in described}
        for item in (item for plan in all_plans for item in plan.items):
            chunks[item.index.fqn].append(cast(TensorWriteData, item.tensor_data).chunk)
        tensors: Any = {
            name: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks[name])
            for name, (_, shape, dtype, _) in described.items()
        }
        return all_plans, Metadata(tensors, planner_data=described)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece, start, stop = self._values[write_item.index]
        return piece.values.detach().reshape(-1)[start - piece.start : stop - piece.start].cpu()


class _Writer(StorageWriter):
    """Tensor files are ordinary safetensors files. Rank 0 has the directory; the others are told."""

    def __init__(self, contents: Contents, target: Path, rank: int) -> None:
        self.directory: Path | None = None
        self._contents, self._target, self._rank = contents, target, rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """One writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._contents = self._contents.packed()  # now: so that nobody writes for nothing

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        save = uuid4().hex
        self._target.parent.mkdir(parents=True, exist_ok=True)
        remove_remains(self._target)
        self.directory = staging(self._target, save)
        self.directory.mkdir()
        return [replace(plan, storage_data=(save, self.directory)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        save, directory = plan.storage_data
        done: Future[list[WriteResult]] = Future()
        if not directory.is_dir():
            raise CheckpointError(
                f"{self._target.parent} on {socket.gethostname()} (rank {self._rank}) is another directory than that "
                "of rank 0: all ranks write into one, so it must be on a file system that all nodes share"
            )
        name = f"rank-{self._rank:05d}.safetensors"
        with writing():
            done.set_result(_write_file(directory / name, plan.items, planner, save) if plan.items else [])
        return done

    @writing()
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.directory is not None
        (save,) = {self.directory.name.rpartition("-")[2]}
        blocks: dict[str, list[Block]] = {name: [] for name in metadata.planner_data}
        files: dict[str, FileRecord] = {}
        for result in (each for rank in results for each in rank):
            block, record = result.storage_data
            blocks[result.index.fqn].append(block)
            files[block.file] = record
        entries = {
            key: Entry.filled(key, shape, dtype, blocks[name], zeros=sparse)
            for name, (key, shape, dtype, sparse) in metadata.planner_data.items()
        }
        stored = {key.name for key in entries}
        index = Index(entries, {n: first for n, first in self._contents.names.items() if first in stored}).to_json()
        write_durably(self.directory / INDEX, index)
        state = self._contents.state
        assert isinstance(state, bytes)
        write_durably(self.directory / STATE, state)
        files |= {INDEX: FileRecord.of(index), STATE: FileRecord.of(state)}
        Manifest(save, self._contents.step, self._contents.written_by, files).write(self.directory)
        put_in_place(self.directory, self._target, save)
        self.directory = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)


def _write_file(path: Path, items: Sequence[WriteItem], planner: SavePlanner, save: str) -> list[WriteResult]:
    """One safetensors file, block by block."""
    # as safetensors does, so that whoever maps the file finds every number on its boundary
    ordered = sorted(items, key=lambda item: -_dtype(item).itemsize)
    header: dict[str, Any] = {"__metadata__": {"save": save}}
    offset = 0
    for item in ordered:
        start, length = _chunk(item).offsets[0], _chunk(item).sizes[0]
        stop = offset + length * _dtype(item).itemsize
        name = f"{item.index.fqn}[{start}:{start + length}]"
        header[name] = {"dtype": DTYPES[_dtype(item)], "shape": [length], "data_offsets": [offset, stop]}
        offset = stop
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    head = len(packed).to_bytes(8, "little") + packed
    record = FileRecord(len(head) + offset, len(head), sha256(head).hexdigest())
    results, offset = [], len(head)
    with open(path, "wb") as file:
        file.write(head)
        for item in ordered:
            values = planner.resolve_data(item)
            assert isinstance(values, Tensor)
            data = memoryview(values.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
            start = _chunk(item).offsets[0]
            block = Block(start, start + values.numel(), path.name, offset, sha256(data).hexdigest())
            file.write(data)
            results.append(WriteResult(item.index, len(data), (block, record)))
            offset += len(data)
        file.flush()
        os.fsync(file.fileno())
    return results


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    return cast(TensorWriteData, item.tensor_data).chunk


def _dtype(item: WriteItem) -> torch.dtype:
    return cast(TensorWriteData, item.tensor_data).properties.dtype


def _packed(state: Mapping[str, Any]) -> bytes:
    try:
        packed = _saved(dict(state))
        torch.load(io.BytesIO(packed), weights_only=True)
        return packed
    except Exception as error:
        raise _told_apart(state) or error from None


def _told_apart(state: Mapping[str, Any]) -> ConfigurationError | None:
    problems = []
    for key, value in state.items():
        try:
            torch.load(io.BytesIO(_saved(value)), weights_only=True)
        except Exception as error:
            problems.append(f"checkpoint[{key!r}]: {_reason(error)}")
    if not problems:
        return None
    return ConfigurationError.of(
        "the checkpoint could be written, but not read again without running code that is in it. Keep plain "
        "values (numbers, strings, lists, dictionaries, tensors) in hyperparameters and in the states of "
        "callbacks, or register the class on every start: torch.serialization.add_safe_globals([Class])",
        problems,
    )


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    """The one line of an UnpicklingError that says what it met."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0] if lines else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
