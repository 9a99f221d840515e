"""What one rank contributes to a checkpoint directory: pieces of tensors, and what is left for rank 0 to know."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_dualpipe.checkpoint.index import Key
from lightning_dualpipe.checkpoint.optimizer_states import place_of
from lightning_dualpipe.checkpoint.store import CheckpointStore
from lightning_dualpipe.checkpoint.writer import Piece
from lightning_dualpipe.parallel.sharded_optimizer import ShardedOptimizer

__all__ = ["main_weight_pieces", "optimizer_pieces", "weight_pieces"]


def weight_pieces(store: CheckpointStore, section: str, local: Mapping[str, Any]) -> list[Piece]:
    """Of a state dict, each tensor that this rank owns, once; the rows that are here of those that are spread."""
    firsts = {store.same_as[name]: tensor for name, tensor in local.items() if name in store.same_as}
    return [
        Piece(Key(section, first), store.shape_of(first), _first_element(store, first), tensor)
        for first, tensor in firsts.items()
        if first in store.owned
    ]


def optimizer_pieces(
    store: CheckpointStore, section: str, local: Mapping[str, Any]
) -> tuple[list[Piece], dict[str, Any]]:
    """Of ``local_optimizer_state`` this rank's parts of moments and the like; and the same without them."""
    pieces, rest = [], {}
    for first, state in local["state"].items():
        shape, rows, elements = store.shape_of(first), store.rows.get(first), local["elements"].get(first)
        rest[first] = dict(state)
        for key, value in state.items():
            place = place_of(key, state, shape, rows, elements, local["rows_apart"])
            if place is not None:
                pieces.append(
                    Piece(Key(section, first, key), place.shape, place.start, value, sparse=True, steady=True)
                )
                del rest[first][key]
    return pieces, {**local, "state": rest}


def main_weight_pieces(store: CheckpointStore, section: str, optimizers: Iterable[ShardedOptimizer]) -> list[Piece]:
    pieces = []
    for sharded in optimizers:
        for first, shard in sharded.shards.items():
            if shard.is_main_weight:
                values: Tensor = shard.stepped
                start = _first_element(store, first) + (shard.elements.start if shard.elements is not None else 0)
                pieces.append(Piece(Key(section, first), store.shape_of(first), start, values, steady=True))
    return pieces


def _first_element(store: CheckpointStore, first: str) -> int:
    """Of what is here of a parameter, in the whole."""
    rows = store.rows.get(first)
    return 0 if rows is None else rows.start * math.prod(store.shape_of(first)[1:])
