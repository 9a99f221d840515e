"""Which elements of which tensor of the whole model lie where in the files of a checkpoint directory.

A tensor is one line of elements, as it lies flat in memory, and is stored in blocks of that line. So a few
experts (rows of a stacked tensor), a rank's share of a moment (ZeRO-1), and a whole matrix are the same thing,
and whoever reads takes the blocks that overlap what it holds.

    experts.weight [4, 2, 3]    0 ······ 6 ······ 12 ······ 18 ······ 24
    written by                  └─ rank 0, block 0 ─┘└─ rank 1 ────────┘
    read by                              └─ rank 3 ──┘
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch

from lightning_dualpipe.checkpoint.manifest import INDEX, FileRecord
from lightning_dualpipe.errors import CheckpointError

__all__ = ["DTYPES", "Block", "Entry", "Index", "Key"]

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors names them."""


class Key(NamedTuple):
    """Which tensor: ``section`` of the checkpoint, ``name`` in the whole model, ``state`` an optimizer keeps of it."""

    section: str
    name: str
    state: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, self))


class Block(NamedTuple):
    """Elements ``start`` to ``stop`` of a tensor, in ``file`` from byte ``offset`` on. Zeros if there is no file."""

    start: int
    stop: int
    file: str
    offset: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...] = field(repr=False)

    def __post_init__(self) -> None:
        edges = [0, *(edge for block in self.blocks for edge in block[:2]), math.prod(self.shape)]
        if any(one != other for one, other in zip(edges[::2], edges[1::2], strict=True)) or any(
            block.start >= block.stop for block in self.blocks
        ):
            raise CheckpointError(f"the blocks of {self.key} are not its {math.prod(self.shape)} elements, each once")

    def overlapping(self, start: int, stop: int) -> list[Block]:
        return [block for block in self.blocks if block.start < stop and start < block.stop]

    @classmethod
    def filled(
        cls, key: Key, shape: tuple[int, ...], dtype: torch.dtype, blocks: Iterable[Block], *, zeros: bool
    ) -> "Entry":
        """
        Args:
            zeros: elements that nobody has are zeros: an optimizer has not met them yet.
        """
        found = sorted(blocks)
        if zeros:
            edges = [0, *(edge for block in found for edge in block[:2]), math.prod(shape)]
            gaps = zip(edges[::2], edges[1::2], strict=True)
            found = sorted([*found, *(Block(start, stop, "", 0, "") for start, stop in gaps if start < stop)])
        return cls(key, shape, dtype, tuple(found))


@dataclass(frozen=True, slots=True)
class Index:
    """
    Args:
        entries: every tensor once.
        names: name -> the name under which its tensor is stored; tied ones have several.
    """

    entries: Mapping[Key, Entry]
    names: Mapping[str, str]

    def to_json(self) -> bytes:
        files = sorted({block.file for entry in self.entries.values() for block in entry.blocks})
        number = {name: position for position, name in enumerate(files)}
        tensors = [
            {
                "key": list(entry.key),
                "dtype": DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "blocks": [[b.start, b.stop, number[b.file], b.offset, b.sha256] for b in entry.blocks],
            }
            for entry in self.entries.values()
        ]
        lines = ",\n".join(json.dumps(tensor) for tensor in tensors)  # a line for each, for grep and diff
        return (
            f'{{"files": {json.dumps(files)},\n"names": {json.dumps(dict(self.names))},\n"tensors": [\n{lines}\n]}}\n'
        ).encode()

    @classmethod
    def from_json(cls, content: bytes, files: Mapping[str, FileRecord]) -> "Index":
        """
        Args:
            files: those of the manifest.

        Raises:
            CheckpointError: it does not describe these files.
        """
        found = json.loads(content)
        names: Sequence[str] = found["files"]
        dtypes = {name: dtype for dtype, name in DTYPES.items()}
        entries = {}
        for each in found["tensors"]:
            blocks = tuple(Block(b[0], b[1], names[b[2]], b[3], b[4]) for b in each["blocks"])
            key = Key(*each["key"])
            entries[key] = Entry(key, tuple(each["shape"]), dtypes[each["dtype"]], blocks)
        index = cls(entries, found["names"])
        index._check_files(files)
        return index

    def _check_files(self, files: Mapping[str, FileRecord]) -> None:
        """That headers and blocks are all there is in each tensor file, byte for byte."""
        spans: dict[str, list[tuple[int, int]]] = {
            name: [(0, record.hashed), (record.size, record.size)] for name, record in files.items()
        }
        for entry in self.entries.values():
            for block in entry.blocks:
                if block.file:
                    stop = block.offset + (block.stop - block.start) * entry.dtype.itemsize
                    spans.setdefault(block.file, []).append((block.offset, stop))
        for name, each in spans.items():
            if name not in files or any(one[1] != other[0] for one, other in pairwise(sorted(each))):
                raise CheckpointError(f"{INDEX} does not describe {name} as the manifest does")

    def of_section(self, section: str) -> dict[str, Entry]:
        return {key.name: entry for key, entry in self.entries.items() if key.section == section}

    def of_states(self, section: str) -> dict[str, dict[str, Entry]]:
        """By the name of the parameter and of the state."""
        found: dict[str, dict[str, Entry]] = {}
        for key, entry in self.entries.items():
            if key.section == section:
                found.setdefault(key.name, {})[key.state] = entry
        return found
