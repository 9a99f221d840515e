"""Between what one rank holds and the checkpoint of the whole model.

    whole_*   collects on rank 0, rank after rank, what each owns; the result is what an uncut model
              would have saved: global names, experts stacked, optimizer states by parameter index
    local_*   takes this rank's part out of such a checkpoint, whoever wrote it

A rank owns a tensor if it is the lowest of those that hold it, so that everything travels once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import TensorSpec

__all__ = ["CheckpointStore"]


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """
    Args:
        whole: names of the whole state dict, in order, with their shapes.
        same_as: every name -> the first name of the same tensor.
        rows: first name -> rows of the whole tensor that this rank holds, for tensors that are spread by rows.
        owned: first names of the tensors that this rank contributes.
        parameters: first name -> this rank's parameter; asked anew each time, since they may be replaced.
        group: all ranks, on a backend that carries CPU objects; None if there is one rank.
    """

    whole: Mapping[str, TensorSpec]
    same_as: Mapping[str, str]
    rows: Mapping[str, range]
    owned: frozenset[str]
    parameters: Callable[[], Mapping[str, nn.Parameter]]
    group: dist.ProcessGroup | None

    # ---- weights ------------------------------------------------------------------------------

    def whole_state_dict(self, local: Mapping[str, Any]) -> dict[str, Any]:
        """On rank 0 the state dict of the uncut model; elsewhere nothing of use. A collective."""
        firsts = {self.same_as[name]: name for name in local if name in self.same_as}
        mine = {first: _to_cpu(local[name]) for first, name in firsts.items() if first in self.owned}
        found: dict[str, Any] = {}
        for part, rows in self._from_all((mine, self.rows)):
            for first, value in part.items():
                self._put(found, first, value, rows.get(first), self.whole[first].shape)
        tensors = {name: found[first] for name, first in self.same_as.items() if first in found}
        return tensors | {name: value for name, value in local.items() if name not in self.same_as}

    def local_state_dict(self, whole: Mapping[str, Any], names: Iterable[str], *, strict: bool) -> dict[str, Any]:
        """The part of a whole state dict that this rank loads into its tensors ``names``.

        Raises:
            ConfigurationError: it belongs to another model (names only if ``strict``, shapes always).
        """
        self._check(whole, strict=strict)
        return {name: self._rows_of(self.same_as.get(name, name), whole[name]) for name in names if name in whole}

    def stream(self, local: Mapping[str, Any]) -> Iterator[tuple[str, range | None, Tensor]]:
        """On rank 0 every tensor of the model once, by its first name; spread ones in several pieces with their rows.

        A collective: every rank iterates to the end, the others to send. One tensor is held at a time.
        """
        firsts = {self.same_as[name]: name for name in local if name in self.same_as}
        mine = sorted(first for first in firsts if first in self.owned)
        for first in mine:
            if self._is_rank_0:
                yield first, self.rows.get(first), local[firsts[first]]
            else:
                self._send((first, self.rows.get(first), _to_cpu(local[firsts[first]])))
        if not self._is_rank_0:
            self._send(None)
        for other in self._others:
            while (piece := self._receive(other)) is not None:
                yield piece

    # ---- optimizers ---------------------------------------------------------------------------

    def local_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of this rank's parameters by name; ``whole_optimizer_state`` understands it."""
        names = self._names()
        packed = optimizer.state_dict()
        by_index = dict(zip(_indices(packed), (names[id(p)] for p in _parameters(optimizer)), strict=True))
        return {
            "state": {by_index[index]: state for index, state in packed["state"].items()},
            "param_groups": [
                {**group, "params": [by_index[index] for index in group["params"]]} for group in packed["param_groups"]
            ],
        }

    def whole_optimizer_state(self, local: Mapping[str, Any]) -> dict[str, Any]:
        """On rank 0 the state of an optimizer of the uncut model, by parameter index. A collective."""
        mine = {name: _to_cpu(state) for name, state in local["state"].items() if name in self.owned}
        states: dict[str, dict[str, Any]] = {}
        groups: list[list[set[str]]] = []
        for part, rows, names in self._from_all((mine, self.rows, [set(g["params"]) for g in local["param_groups"]])):
            groups.append(names)
            for first, state in part.items():
                whole, spread = states.setdefault(first, {}), rows.get(first)
                for key, value in state.items():
                    full = self.whole[first].shape
                    like_parameter = isinstance(value, Tensor) and value.shape[1:] == full[1:] and value.ndim
                    self._put(whole, key, value, spread if like_parameter else None, full)
        order = self._in_order(groups)
        index = {name: position for position, name in enumerate(name for group in order for name in group)}
        return {
            "state": {index[name]: states[name] for name in index if name in states},
            "param_groups": [
                {**group, "params": [index[name] for name in names]}
                for group, names in zip(local["param_groups"], order, strict=True)
            ],
        }

    def local_part_of_optimizer_state(self, optimizer: Optimizer, whole: Mapping[str, Any]) -> dict[str, Any]:
        """What ``optimizer.load_state_dict`` of this rank takes, from the state of an uncut model. A collective.

        Raises:
            ConfigurationError: the checkpoint's optimizer has other parameter groups.
        """
        names = self._names()
        mine = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        order = self._in_order([groups for (groups,) in self._to_all(([set(group) for group in mine],))])
        saved = [group["params"] for group in whole["param_groups"]]
        if [len(group) for group in order] != [len(group) for group in saved]:
            raise ConfigurationError(
                f"the checkpoint's optimizer has parameter groups of {[len(group) for group in saved]} parameters, "
                f"this one of {[len(group) for group in order]}; resume with the optimizer that was saved"
            )
        saved_index = {n: i for names, ids in zip(order, saved, strict=True) for n, i in zip(names, ids, strict=True)}
        position = {name: index for index, name in enumerate(name for group in mine for name in group)}
        states = {
            position[name]: self._rows_of(name, whole["state"][saved_index[name]])
            for name in position
            if saved_index[name] in whole["state"]
        }
        groups = [
            {**group, "params": [position[name] for name in names]}
            for group, names in zip(whole["param_groups"], mine, strict=True)
        ]
        return {"state": states, "param_groups": groups}

    # ---- helpers ------------------------------------------------------------------------------

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.parameters().items()}

    def _rows_of(self, first: str, value: Any) -> Any:
        """This rank's rows of a whole tensor, or of every tensor of a state that has its shape."""
        rows = self.rows.get(first)
        if rows is None:
            return value
        if isinstance(value, Mapping):
            return {key: self._rows_of(first, item) for key, item in value.items()}
        spread = isinstance(value, Tensor) and value.shape == self.whole[first].shape
        return value[rows.start : rows.stop] if spread else value

    def _in_order(self, parts: Sequence[Sequence[set[str]]]) -> list[list[str]]:
        """Names of each parameter group over all ranks, in the order of the uncut model's parameters."""
        place = {name: index for index, name in enumerate(self.whole)}
        return [sorted(set.union(*groups), key=place.__getitem__) for groups in zip(*parts, strict=True)]

    @staticmethod
    def _put(found: dict[str, Any], key: str, value: Any, rows: range | None, shape: tuple[int, ...]) -> None:
        if rows is None:
            found[key] = value
        else:
            if key not in found:
                found[key] = value.new_empty((shape[0], *value.shape[1:]))
            found[key][rows.start : rows.stop] = value

    def _check(self, whole: Mapping[str, Any], *, strict: bool) -> None:
        missing = [name for name in self.whole if name not in whole] if strict else []
        foreign = [name for name in whole if name not in self.whole] if strict else []
        misshapen = [
            f"{name} is {tuple(whole[name].shape)}, here {spec.shape}"
            for name, spec in self.whole.items()
            if isinstance(whole.get(name), Tensor) and tuple(whole[name].shape) != tuple(spec.shape)
        ]
        problems = [
            f"{len(names)} tensors {what}: {', '.join(names[:4])}{', …' * (len(names) > 4)}"
            for what, names in (
                ("of this model are missing in it", missing),
                ("in it are unknown to this model", foreign),
                ("have another shape", misshapen),
            )
            if names
        ]
        if problems:
            remedy = "build the model with the configuration it was saved with"
            raise ConfigurationError.of(f"the checkpoint belongs to another model; {remedy}", problems)

    def _from_all(self, mine: tuple[Any, ...]) -> Iterable[tuple[Any, ...]]:
        """What every rank passes, on rank 0, one rank at a time; on the others only their own."""
        yield mine
        if not self._is_rank_0:
            self._send(mine)
        for other in self._others:
            yield self._receive(other)

    @property
    def _is_rank_0(self) -> bool:
        return self.group is None or dist.get_rank(self.group) == 0

    @property
    def _others(self) -> range:
        """The ranks that rank 0 hears from; nobody for the others."""
        return range(1, dist.get_world_size(self.group)) if self.group is not None and self._is_rank_0 else range(0)

    def _send(self, value: Any) -> None:
        dist.send_object_list([value], group=self.group, group_dst=0)

    def _receive(self, rank: int) -> Any:
        box: list[Any] = [None]
        dist.recv_object_list(box, group=self.group, group_src=rank)
        return box[0]

    def _to_all(self, mine: tuple[Any, ...]) -> Sequence[tuple[Any, ...]]:
        if self.group is None:
            return [mine]
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, mine, group=self.group)
        return found


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return {key: _to_cpu(item) for key, item in value.items()} if isinstance(value, dict) else value


def _indices(packed: Mapping[str, Any]) -> list[int]:
    return [index for group in packed["param_groups"] for index in group["params"]]


def _parameters(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
