"""Who of the holders of some parameters updates which of their elements: arithmetic only.

Their states are large (AdamW: 8 bytes of float32 for each parameter, 12 with a main weight), and
every holder would compute the same. So each holder owns a part, keeps the optimizer's states of
that part alone, and the others receive the updated weights from it (ZeRO-1, arXiv:1910.02054).

    slices   a │ b      │ c          one line of all elements, cut into equal parts: for optimizers that treat
             ▲──0──▲──1──▲──2──▲     each element alone. A holder owns a few long pieces; equal to a few bytes.
    whole    a c │ b                 parameters as they are, the largest first to whoever owns least: for
             ──0── ─1─               optimizers that look at the shape (Muon, Adafactor). As equal as sizes allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Ownership", "Piece", "slices", "whole"]


class Piece(NamedTuple):
    """Elements of one parameter, as it lies flat in memory."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:  # of elements, not of fields
        return self.stop - self.start


Ownership = tuple[tuple[Piece, ...], ...]
"""What each holder owns, in the order of the holders' ranks."""

_ALIGNED = 16  # elements: so that vectorised kernels find most pieces aligned


def slices(sizes: Mapping[str, int], num_owners: int) -> Ownership:
    """Equal parts of the line of all elements. At most one piece of a parameter goes to one owner."""
    share = -(-sum(sizes.values()) // num_owners)
    share = -(-share // _ALIGNED) * _ALIGNED
    owned: list[list[Piece]] = [[] for _ in range(num_owners)]
    begin = 0
    for name, size in sizes.items():
        for owner in range(begin // share, -(-(begin + size) // share)) if size else ():
            start, stop = max(owner * share - begin, 0), min((owner + 1) * share - begin, size)
            owned[owner].append(Piece(name, start, stop))
        begin += size
    return tuple(map(tuple, owned))


def whole(sizes: Mapping[str, int], num_owners: int) -> Ownership:
    """Every parameter to one owner: the largest first, always to the one with the least, the first of several."""
    owned: list[list[Piece]] = [[] for _ in range(num_owners)]
    loads = [0] * num_owners
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owner = loads.index(min(loads))
        owned[owner].append(Piece(name, 0, size))
        loads[owner] += size
    return tuple(map(tuple, owned))
