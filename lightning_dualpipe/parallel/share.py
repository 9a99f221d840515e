"""Every owner tells the other holders the new values of what it owns.

An owner's pieces, one after the other, form its line. Lines travel in rounds, so that buffers stay
small whatever the size of the model; while one round travels the next is packed:

    lines     0 ▬▬▬▬▬▬│▬▬▬▬▬▬│▬▬▬       equal lines: one all-gather a round
              1 ▬▬▬▬▬▬│▬▬▬▬▬▬│▬▬▬
    unequal   one broadcast after the other: padding to the longest could be most of the traffic
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.parallel.ownership import Ownership, Piece

__all__ = ["share"]


@torch.no_grad()
def share(flats: Mapping[str, Tensor], owned: Ownership, group: dist.ProcessGroup, bucket_bytes: int) -> None:
    """Fill ``flats``, one line of elements for each parameter and all of one dtype, with what their owners have.

    Args:
        owned: by rank of ``group``.
    """
    lengths = [sum(map(len, pieces)) for pieces in owned]
    if not any(lengths):
        return
    equal = max(lengths) * len(lengths) <= 1.05 * sum(lengths) + 1024
    travelling: deque[_Round] = deque()
    for one in _gathers(flats, owned, group, bucket_bytes) if equal else _broadcasts(flats, owned, group, bucket_bytes):
        travelling.append(one)
        if len(travelling) > 1:
            travelling.popleft().arrive()
    for last in travelling:
        last.arrive()


# its new name from torch 2.13 on, where the old one warns
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Round(NamedTuple):
    work: dist.Work
    unpack: Callable[[], None]

    def arrive(self) -> None:
        self.work.wait()
        self.unpack()


def _gathers(
    flats: Mapping[str, Tensor], owned: Ownership, group: dist.ProcessGroup, bucket_bytes: int
) -> Iterator[_Round]:
    like = next(iter(flats.values()))
    rank, longest = group.rank(), max(sum(map(len, pieces)) for pieces in owned)
    length = max(bucket_bytes // (len(owned) * like.itemsize), 1)
    for begin in range(0, longest, length):
        end = min(begin + length, longest)
        mine, received = like.new_zeros(end - begin), like.new_empty(len(owned), end - begin)
        _pack(mine, flats, owned[rank], begin)
        work = _all_gather(received.view(-1), mine, group=group, async_op=True)
        theirs = [(received[owner], pieces) for owner, pieces in enumerate(owned) if owner != rank]
        yield _Round(_present(work), _unpacking(theirs, flats, begin))


def _broadcasts(
    flats: Mapping[str, Tensor], owned: Ownership, group: dist.ProcessGroup, bucket_bytes: int
) -> Iterator[_Round]:
    like = next(iter(flats.values()))
    length = max(bucket_bytes // like.itemsize, 1)
    for owner, pieces in enumerate(owned):
        line = sum(map(len, pieces))
        for begin in range(0, line, length):
            sent = like.new_empty(min(length, line - begin))
            if owner == group.rank():
                _pack(sent, flats, pieces, begin)
            work = dist.broadcast(sent, group=group, group_src=owner, async_op=True)
            theirs = [] if owner == group.rank() else [(sent, pieces)]
            yield _Round(_present(work), _unpacking(theirs, flats, begin))


def _pack(line: Tensor, flats: Mapping[str, Tensor], pieces: Sequence[Piece], begin: int) -> None:
    pairs = list(_overlaps(line, flats, pieces, begin))
    if pairs:
        torch._foreach_copy_([part for part, _ in pairs], [values for _, values in pairs])


def _unpacking(
    lines: Sequence[tuple[Tensor, Sequence[Piece]]], flats: Mapping[str, Tensor], begin: int
) -> Callable[[], None]:
    def unpack() -> None:
        pairs = [pair for line, pieces in lines for pair in _overlaps(line, flats, pieces, begin)]
        if pairs:
            torch._foreach_copy_([values for _, values in pairs], [part for part, _ in pairs])

    return unpack


def _overlaps(
    line: Tensor, flats: Mapping[str, Tensor], pieces: Sequence[Piece], begin: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of ``line``, which stands for an owner's elements from ``begin`` on, and where their values belong."""
    position = -begin  # of the piece, in ``line``
    for name, start, stop in pieces:
        first, last = max(position, 0), min(position + stop - start, len(line))
        if first < last:
            yield line[first:last], flats[name][start + first - position : start + last - position]
        position += stop - start


def _present(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank belongs to the group"
    return work
