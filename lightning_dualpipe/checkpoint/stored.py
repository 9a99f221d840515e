"""Read a checkpoint directory: what is no tensor at once, and of tensors what is asked for.

    checkpoint = open_stored(path).checkpoint()      a Lightning checkpoint, with a StoredTensor for each tensor
    mine = read(parts of it, group)                  the elements that a rank wants, every block checked

Nothing is unpickled but through ``weights_only``, and every byte that is used was hashed before.
"""

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from lightning_dualpipe.checkpoint.directory import find
from lightning_dualpipe.checkpoint.failures import first_failure
from lightning_dualpipe.checkpoint.index import Block, Entry, Index
from lightning_dualpipe.checkpoint.manifest import INDEX, REMEDY, STATE, Manifest
from lightning_dualpipe.errors import CheckpointError

__all__ = ["Stored", "StoredTensor", "open_stored", "read", "read_whole", "stored_in"]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A checkpoint directory whose files are all there, with the lengths they were written with."""

    directory: Path
    manifest: Manifest
    index: Index

    def state(self) -> dict[str, Any]:
        """The checkpoint without its tensors.

        Raises:
            CheckpointError: damaged, or loading it would need to run code.
        """
        content = self.manifest.read_whole(self.directory, STATE)
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.directory / STATE} holds more than plain values ({str(error).splitlines()[0]}): it was not "
                "loaded, and no code of it was run. If you know the class, torch.serialization.add_safe_globals"
            ) from None

    def checkpoint(self) -> dict[str, Any]:
        """As ``strategy="auto"`` would have saved it, where a StoredTensor stands for each tensor."""
        found = self.state()
        sections = {key.section for key in self.index.entries}
        for section in sorted(sections & {"state_dict", "current_model_state"}):
            here = self.index.of_section(section)
            tensors = {n: self.tensor(here[first]) for n, first in self.index.names.items() if first in here}
            found[section] = tensors | found.get(section, {})
        if "main_weights" in sections:
            main_weights = self.index.of_section("main_weights")
            found["main_weights"] = {name: self.tensor(entry) for name, entry in main_weights.items()}
        for number, optimizer in enumerate(found.get("optimizer_states", ())):
            names = [name for group in found["optimized_parameters"][number] for name in group]
            indices = [i for group in optimizer["param_groups"] for i in group["params"]]
            place = dict(zip(names, indices, strict=True))
            for name, states in self.index.of_states(f"optimizer_states.{number}").items():
                tensors = {key: self.tensor(entry) for key, entry in states.items()}
                optimizer["state"].setdefault(place[name], {}).update(tensors)
        return found

    def tensor(self, entry: Entry) -> "StoredTensor":
        return StoredTensor(self, entry, entry.shape, 0)

    def verify(self) -> int:
        """Read every byte. Returns how many there are.

        Raises:
            CheckpointError: one is not as it was written.
        """
        self.state()
        self.manifest.read_whole(self.directory, INDEX)
        files = _Files(self)
        for entry in self.index.entries.values():
            for block in entry.blocks:
                files.read(block, entry)
        return sum(record.size for record in self.manifest.files.values())


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor that is not read yet, or some of its rows, or of its elements.

    Its first element is number ``start`` of the whole tensor.
    """

    stored: Stored
    entry: Entry
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def reshape(self, _: int) -> "StoredTensor":
        """As one line of elements; no other shape is needed."""
        return StoredTensor(self.stored, self.entry, (self.numel(),), self.start)

    def __getitem__(self, rows: slice) -> "StoredTensor":
        first, stop, _ = rows.indices(self.shape[0])
        stride = torch.Size(self.shape[1:]).numel()
        return StoredTensor(self.stored, self.entry, (stop - first, *self.shape[1:]), self.start + first * stride)

    def read(self) -> Tensor:
        """What it stands for; no collective."""
        return _read_alone([self])[0]


def open_stored(path: str | os.PathLike[str]) -> Stored:
    """
    Raises:
        CheckpointError: it is no checkpoint directory, or not whole.
    """
    directory = find(Path(path))
    manifest = Manifest.read(directory)
    manifest.check_lengths(directory)
    try:
        index = Index.from_json(manifest.read_whole(directory, INDEX), manifest.files)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / INDEX} is not what it says: {error!r}. {REMEDY}") from None
    return Stored(directory, manifest, index)


def read_whole(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The Lightning checkpoint that a directory holds, all of it in memory.

    Raises:
        CheckpointError: it is no checkpoint directory, or not as it was written.
    """
    stored = open_stored(path)
    whole: dict[str, Any] = read(stored.checkpoint(), stored, None)
    return whole


def stored_in(tree: Any) -> Stored | None:
    """Where the stored tensors in nested dictionaries are from, if there is one."""
    return next((tensor.stored for tensor in _tensors_in(tree)), None)


def read(tree: Any, stored: Stored, group: dist.ProcessGroup | None) -> Any:
    """Nested dictionaries with the stored tensors in them read. A collective: every rank reads its own.

    Raises:
        CheckpointError: on all ranks, if one met a damaged block.
    """
    wanted = list(dict.fromkeys(_tensors_in(tree)))
    if group is None:
        tensors = _read_alone(wanted)
    else:
        planner = _Planner(wanted, stored)
        try:
            dcp.load({}, storage_reader=_Reader(stored, wanted), planner=planner, process_group=group)
        except BaseException as error:
            raise first_failure(error) from None
        tensors = [tensor.view(one.shape) for one, tensor in zip(wanted, planner.tensors, strict=True)]
    return _replaced(tree, dict(zip(wanted, tensors, strict=True)))


def _tensors_in(tree: Any) -> Iterable[StoredTensor]:
    if isinstance(tree, StoredTensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors_in(value)


def _replaced(tree: Any, found: Mapping[StoredTensor, Tensor]) -> Any:
    if isinstance(tree, StoredTensor):
        return found[tree]
    if isinstance(tree, Mapping):
        return {key: _replaced(value, found) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replaced(value, found) for value in tree]
    return tree


def _read_alone(wanted: list[StoredTensor]) -> list[Tensor]:
    if not wanted:
        return []
    planner, reader = _Planner(wanted, wanted[0].stored), _Reader(wanted[0].stored, wanted)
    reader.read_data(planner.create_local_plan(), planner)
    return [tensor.view(one.shape) for one, tensor in zip(wanted, planner.tensors, strict=True)]


class _Planner(LoadPlanner):
    """Of each wanted tensor the parts of the blocks that overlap it."""

    def __init__(self, wanted: list[StoredTensor], stored: Stored) -> None:
        self._wanted, self._stored = wanted, stored
        self.tensors = [torch.empty(each.numel(), dtype=each.dtype) for each in wanted]

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """All is known."""

    def create_local_plan(self) -> LoadPlan:
        items = []
        for number, each in enumerate(self._wanted):
            end = each.start + each.numel()
            for block in each.entry.overlapping(each.start, end):
                start, stop = max(block.start, each.start), min(block.stop, end)
                items.append(
                    ReadItem(
                        LoadItemType.TENSOR,
                        dest_index=MetadataIndex(str(number)),
                        dest_offsets=torch.Size((start - each.start,)),
                        storage_index=MetadataIndex(str(each.entry.key), (block.start,)),
                        storage_offsets=torch.Size((start - block.start,)),
                        lengths=torch.Size((stop - start,)),
                    )
                )
        return LoadPlan(items, planner_data=self._stored.manifest.save)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        if len({plan.planner_data for plan in global_plan}) > 1:
            raise CheckpointError(
                f"{self._stored.directory} is not the same checkpoint on all ranks: it must be on a file system that "
                "all nodes share, and stay as it is while it is loaded"
            )
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("all that is no tensor is in the state")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        start = read_item.dest_offsets[0]
        return self.tensors[int(read_item.dest_index.fqn)][start : start + read_item.lengths[0]]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was written in place."""


class _Reader(StorageReader):
    def __init__(self, stored: Stored, wanted: Iterable[StoredTensor]) -> None:
        self._stored = stored
        self._blocks = {
            MetadataIndex(str(each.entry.key), (block.start,)): (each.entry, block)
            for each in wanted
            for block in each.entry.blocks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """One reader is for one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The index was read when the directory was opened."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """One block after the other, in the order of the files; a block that several want is read once."""
        by_place: dict[Block, tuple[Entry, list[ReadItem]]] = {}
        for item in plan.items:
            entry, block = self._blocks[item.storage_index]
            by_place.setdefault(block, (entry, []))[1].append(item)
        files = _Files(self._stored)
        for block in sorted(by_place, key=lambda block: (block.file, block.offset, block.start)):
            entry, items = by_place[block]
            values = files.read(block, entry) if block.file else None
            for item in items:
                target, start = planner.resolve_tensor(item), item.storage_offsets[0]
                if values is None:
                    target.zero_()
                else:
                    target.copy_(values[start : start + item.lengths[0]])
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)


class _Files:
    """Tensor files, whose headers are checked when they are first read."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._checked: set[str] = set()

    def read(self, block: Block, entry: Entry) -> Tensor | None:
        """
        Raises:
            CheckpointError: these are not the bytes that were written there.
        """
        if not block.file:
            return None
        path, manifest = self._stored.directory / block.file, self._stored.manifest
        content = bytearray((block.stop - block.start) * entry.dtype.itemsize)
        try:
            with open(path, "rb") as file:
                if block.file not in self._checked:
                    record = manifest.files[block.file]
                    head = file.read(record.hashed)
                    if sha256(head).hexdigest() != record.sha256:
                        raise CheckpointError(f"{path} {_whose(head, manifest.save)}. {REMEDY}")
                    self._checked.add(block.file)
                file.seek(block.offset)
                length = file.readinto(content)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if length != len(content) or sha256(content).hexdigest() != block.sha256:
            raise CheckpointError(
                f"{path} is damaged: bytes {block.offset} to {block.offset + len(content)}, elements {block.start} to "
                f"{block.stop} of {entry.key}, are not those that were written. {REMEDY}"
            )
        return torch.frombuffer(content, dtype=entry.dtype)


def _whose(head: bytes, save: str) -> str:
    """What is wrong with a tensor file of another hash."""
    mark = b'{"__metadata__": {"save": "'
    other = head[8:].partition(mark)[2][:32]
    if head[8:].startswith(mark) and other != save.encode():
        return f"belongs to another checkpoint: it was written by save {other.decode(errors='replace')}, not {save}"
    return "is damaged: its header is not the one that was written"
