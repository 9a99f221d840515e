"""A small checkpoint directory, and ways to spoil it."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dualpipe.checkpoint.index import Key
from lightning_dualpipe.checkpoint.writer import Contents, Piece, save

SHAPES = {"embed": (13, 4), "experts": (4, 3, 5), "bias": (4,), "count": ()}


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "embed": torch.randn(13, 4, generator=generator),
        "experts": torch.randn(4, 3, 5, generator=generator).bfloat16(),
        "bias": torch.randn(4, generator=generator, dtype=torch.float64),
        "count": torch.tensor(step),
    }


def write(rank: int, target: str, step: int, world: int = 1, state: Mapping[str, Any] | None = None) -> None:
    """Each of ``world`` ranks has some flat elements of each tensor; ``run_ranks`` calls it."""
    pieces = []
    for name, whole in tensors(step).items():
        size = whole.numel()
        start, stop = rank * size // world, (rank + 1) * size // world
        if start < stop:
            key = Key("state_dict", name)
            pieces.append(Piece(key, tuple(whole.shape), start, whole.reshape(-1)[start:stop]))
    contents = Contents(
        {"state_dict": {}, "global_step": step, "loops": {"done": step}, **(state or {})},
        {**{name: name for name in SHAPES}, "head": "embed"},
        step,
        f"{world} ranks",
    )
    group = torch.distributed.group.WORLD if world > 1 else None
    save(pieces, contents, Path(target), group, rank=rank)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def positions(directory: Path, count: int, seed: int) -> Iterator[tuple[str, int]]:
    """Bytes of a directory, each as likely as any other, and every file at least once."""
    generator = torch.Generator().manual_seed(seed)
    files = files_of(directory)
    for number in range(count):
        names = list(files) if number >= len(files) else [list(files)[number]]
        sizes = torch.tensor([float(len(files[name])) for name in names])
        name = names[int(torch.multinomial(sizes, 1, generator=generator))]
        yield name, int(torch.randint(len(files[name]), (1,), generator=generator))


def copy(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target
