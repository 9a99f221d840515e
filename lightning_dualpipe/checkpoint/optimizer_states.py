"""States of an optimizer: how the parts that ranks have become those of the uncut model, and back; and their order.

What a rank that has some rows (experts) of a parameter [E, O, I] may keep of it:

    like the parameter   [rows, O, I]    its rows, or some elements of these
    by row               [rows, O, 1]    Adafactor factors each expert by itself: again its rows
    one for all          []              the count of steps: the same on every rank
    anything else        [1, I]          of a [rows, I], the mean over the rows that are here: not that over all
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adafactor, Optimizer

from lightning_dualpipe.checkpoint.stored import StoredTensor
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["Collected", "Place", "check_states", "in_order", "part_of", "place_of", "treats_rows_apart"]

Shape = tuple[int, ...]


def treats_rows_apart(optimizer: Optimizer) -> bool:
    """Whether all it keeps of a parameter of three dimensions has the first of them. Known of this very class."""
    return type(optimizer) is Adafactor


# ---- to the whole ------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the elements of a part lie in the whole: one after the other from ``start`` on, as it is flat in memory."""

    shape: Shape
    start: int


def place_of(
    key: str, state: Mapping[str, Any], shape: Shape, rows: range | None, elements: range | None, rows_apart: bool
) -> Place | None:
    """Of ``state[key]``, one rank's state of a parameter of this whole shape, of its ``rows`` or of flat ``elements``.

    None: it has no place of its own; it is one value for all ranks, or of no whole at all.
    """
    value, stride = state[key], math.prod(shape[1:])
    first_element = 0 if rows is None else rows.start * stride
    if elements is not None and _has_shape(key, value, (len(elements),)):
        return Place(shape, first_element + elements.start)
    if rows is not None and _is_by_row(key, state, shape, len(rows), rows_apart):
        return Place((shape[0], *value.shape[1:]), rows.start * math.prod(value.shape[1:]))
    if rows is None and elements is None and isinstance(value, Tensor) and value.ndim > 0:
        return Place(tuple(value.shape), 0)
    return None


def _is_by_row(key: str, state: Mapping[str, Any], shape: Shape, rows: int, rows_apart: bool) -> bool:
    value, here = state[key], (rows, *shape[1:])
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != rows:
        return False
    if rows > 1 or (rows_apart and len(shape) > 2):
        return all(size in (1, *shape[1:]) for size in value.shape[1:])
    # a first dimension of one: that row, or what is left of a dimension that was summed over
    return _has_shape(key, value, here) and all(
        other.ndim == 0 or other.shape == here for other in state.values() if isinstance(other, Tensor)
    )


@dataclass(slots=True)
class Collected:
    """What ranks have, put together.

    Args:
        shape_of: a parameter of the uncut model.
        rows_apart: see ``treats_rows_apart``.
    """

    shape_of: Callable[[str], Shape]
    rows_apart: bool = False
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    _problems: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, first: str, state: Mapping[str, Any], rows: range | None, elements: range | None) -> None:
        """One rank's state of a parameter, or of its ``rows``, or of some flat ``elements`` of what is here."""
        whole = self.states.setdefault(first, {})
        for key, value in state.items():
            if rows is None and elements is None:
                whole[key] = value
            elif (place := place_of(key, state, self.shape_of(first), rows, elements, self.rows_apart)) is not None:
                target = whole.setdefault(key, value.new_zeros(place.shape)).view(-1)
                target[place.start : place.start + value.numel()] = value.reshape(-1)
            else:
                self._add_common(first, key, value)

    def check(self) -> None:
        """
        Raises:
            ConfigurationError: of some states nobody knows the whole.
        """
        if self._problems:
            raise ConfigurationError.of(
                "the optimizer's state cannot be saved: each rank updates its own experts, and what it keeps of them "
                "is not that of all experts. Use an optimizer that updates each element, or each expert, by itself "
                "(AdamW; Adafactor for experts stacked in three dimensions), or expert_parallel_size=1",
                [f"{first}, {key!r}: {problem}" for (first, key), problem in self._problems.items()][:8],
            )

    def _add_common(self, first: str, key: str, value: Any) -> None:
        """What every rank must have alike."""
        whole = self.states[first]
        if key == "step" and key in whole:  # behind where no token came for a while; in an uncut model it is one count
            whole[key] = max(whole[key], value)
        elif isinstance(value, Tensor) and value.numel() != 1:
            self._problems[first, key] = (
                f"shape {tuple(value.shape)} on a rank, of a parameter of {self.shape_of(first)}"
            )
        elif isinstance(value, Tensor | float | int | str | None):
            if key in whole and not _same(whole[key], value):
                self._problems[first, key] = f"{_plain(whole[key])} on one rank, {_plain(value)} on another"
            whole[key] = value
        else:
            self._problems[first, key] = f"a {type(value).__name__} on every rank"


def _has_shape(key: str, value: Any, shape: Shape) -> bool:
    """A count of steps is one number, though it may look like a parameter of one element."""
    return key != "step" and isinstance(value, Tensor) and value.shape == shape


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


# ---- from the whole ----------------------------------------------------------------------------


def part_of(key: str, value: Any, shape: Shape, rows: range | None, elements: range | None) -> Any:
    """A rank's part of a value of the state of a parameter of this whole shape."""
    if not isinstance(value, Tensor | StoredTensor) or key == "step":
        return value
    like_parameter = tuple(value.shape) == shape
    if rows is not None and value.ndim and value.shape[0] == shape[0]:
        value = value[rows.start : rows.stop]
    if elements is not None and like_parameter:
        value = value.reshape(-1)[elements.start : elements.stop]
    return value


def check_states(
    states: Mapping[str, Mapping[str, Any]],
    shape_of: Callable[[str], Shape],
    *,
    spread: Callable[[str], bool],
    elementwise: bool,
) -> None:
    """
    Args:
        spread: whether ranks have only some rows of a parameter.
        elementwise: a state has the parameter's shape, or is one number. Otherwise its sizes are among the parameter's.

    Raises:
        ConfigurationError: these are states of other parameters, or cannot be shared out.
    """
    problems = []
    for first, state in states.items():
        shape = shape_of(first)
        for key, value in state.items():
            tensor = isinstance(value, Tensor | StoredTensor)
            if not tensor or value.numel() == 1 or tuple(value.shape) == tuple(shape):
                continue
            about = f"{first}, {key!r}: shape {tuple(value.shape)}, the parameter's is {shape}"
            if elementwise or (value.ndim == len(shape) and not set(value.shape) <= {1, *shape}):
                problems.append(about)
            elif spread(first) and value.shape[0] != shape[0]:
                problems.append(f"{about}, and its rows are on several ranks")
    if problems:
        remedy = "resume with the optimizer that was saved, its parameters in the same order"
        raise ConfigurationError.of(
            f"the checkpoint's optimizer states do not fit this run's parameters; {remedy}", problems[:8]
        )


# ---- their order -------------------------------------------------------------------------------


def in_order(
    known: Sequence[Sequence[str]], parts: Sequence[Sequence[Sequence[str]]], model: Iterable[str]
) -> list[list[str]]:
    """Names of each parameter group over all ranks, as an optimizer of the uncut model would have them.

    Args:
        known: the groups of ``configure_optimizers``.
        parts: of each rank the groups as they are now, with what it holds.
        model: all names, in the order of the model.

    Raises:
        ConfigurationError: of a group that was added or changed since, the order cannot be told.
    """
    place = {name: index for index, name in enumerate(model)}
    order = []
    for index, pieces in enumerate(zip(*parts, strict=True)):
        group = known[index] if index < len(known) else ()
        order.append(list(group) if _is_made_of(group, pieces) else _merged(index, pieces, place))
    return order


def _is_made_of(group: Sequence[str], pieces: Sequence[Sequence[str]]) -> bool:
    if set(group) != set().union(*pieces):
        return False
    place = {name: index for index, name in enumerate(group)}
    return all(place[one] < place[next_] for piece in pieces for one, next_ in pairwise(piece))


def _merged(index: int, pieces: Sequence[Sequence[str]], place: Mapping[str, int]) -> list[str]:
    """The only order that agrees with every rank's; that of the model if all have theirs in it, as from modules."""
    if all(place[one] < place[next_] for piece in pieces for one, next_ in pairwise(piece)):
        return sorted(set().union(*pieces), key=place.__getitem__)
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for piece in pieces:
        for name in piece:
            sorter.add(name)
        for one, next_ in pairwise(piece):
            sorter.add(next_, one)
    order: list[str] = []
    try:
        sorter.prepare()
        while sorter.is_active():
            ready = sorter.get_ready()
            if len(ready) > 1:
                raise _unordered(index, f"no rank has both of {sorted(ready, key=place.__getitem__)[:2]}")
            order += ready
            sorter.done(*ready)
    except CycleError as error:
        raise _unordered(index, f"ranks disagree about {error.args[1][:2]}") from None
    return order


def _unordered(index: int, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"parameter group {index} was added or changed after configure_optimizers, and in which order an optimizer of "
        f"the whole model would have its parameters cannot be told: {why}. Give its parameters in the order of "
        "module.parameters(), or make the group in configure_optimizers"
    )
