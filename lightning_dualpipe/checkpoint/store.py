"""Between what one rank holds and the checkpoint of the whole model.

    whole_*   collects on rank 0, rank after rank, what each owns; the result is what an uncut model
              would have saved: global names, experts stacked, optimizer states by parameter index
    local_*   takes this rank's part out of such a checkpoint, whoever wrote it

A rank owns a tensor if it is the lowest of those that hold it, so that everything travels once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_dualpipe.checkpoint.optimizer_states import Collected, check_states, in_order, part_of, treats_rows_apart
from lightning_dualpipe.checkpoint.stored import StoredTensor, read, stored_in
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import TensorSpec
from lightning_dualpipe.parallel.sharded_optimizer import ShardedOptimizer, WholeOrder

__all__ = ["CheckpointStore"]


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """
    Args:
        whole: names of the whole state dict, in order, with their shapes.
        same_as: every name -> the first name of the same tensor.
        rows: first name -> rows of the whole tensor that this rank holds, for tensors that are spread by rows.
        owned: first names of the tensors that this rank contributes.
        group: all ranks, on a backend that carries CPU objects; None if there is one rank.
    """

    whole: Mapping[str, TensorSpec]
    same_as: Mapping[str, str]
    rows: Mapping[str, range]
    owned: frozenset[str]
    group: dist.ProcessGroup | None

    def shape_of(self, first: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.whole[first].shape)

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
        mine = {name: self._rows_of(self.same_as.get(name, name), whole[name]) for name in names if name in whole}
        return self._read(mine, whole)

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

    def local_optimizer_state(self, sharded: ShardedOptimizer) -> dict[str, Any]:
        """State of this rank's shards by parameter name; ``whole_optimizer_state`` understands it."""
        names = {id(shard.stepped): name for name, shard in sharded.shards.items()}
        with sharded.in_place():
            packed = {"state": {}, "param_groups": []} | sharded.optimizer.state_dict()  # Lightning's mock has none
            shards = [names.get(id(parameter)) for parameter in _parameters(sharded.optimizer)]
        by_index = dict(zip(_indices(packed), shards, strict=True))
        return {
            "state": {by_index[index]: state for index, state in packed["state"].items()},
            "elements": {name: shard.elements for name, shard in sharded.shards.items() if shard.elements is not None},
            "param_groups": [
                {**group, "params": mine} for group, mine in zip(packed["param_groups"], sharded.names(), strict=True)
            ],
            "order": sharded.order,
            "rows_apart": treats_rows_apart(sharded.optimizer),
        }

    def whole_optimizer_state(self, local: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
        """On rank 0 the state of an optimizer of the uncut model, by parameter index; and the names by group.

        A collective.

        Raises:
            ConfigurationError: what ranks have is not part of any whole.
        """
        names = [group["params"] for group in local["param_groups"]]
        mine = (_to_cpu(local["state"]), self.rows, local["elements"], names)
        collected = Collected(self.shape_of, local["rows_apart"])
        groups: list[list[list[str]]] = []
        for part, rows, elements, their_names in self._from_all(mine):
            groups.append(their_names)
            for first, state in part.items():
                collected.add(first, state, rows.get(first), elements.get(first))
        if not self._is_rank_0:
            return {}, []
        collected.check()
        known: WholeOrder | None = local["order"]
        order = in_order(known.names if known else (), groups, self.whole)
        index = {name: position for position, name in enumerate(name for group in order for name in group)}
        states = collected.states
        packed = [
            {**group, "params": [index[name] for name in names]}
            for group, names in zip(local["param_groups"], order, strict=True)
        ]
        for position, group in enumerate(packed):
            if "param_names" in group and known is not None and order[position] == list(known.names[position]):
                group["param_names"] = list(known.given[position])
        return {"state": {index[name]: states[name] for name in index if name in states}, "param_groups": packed}, order

    def load_optimizer_state(
        self, sharded: ShardedOptimizer, whole: Mapping[str, Any], names: Sequence[Sequence[str]] | None
    ) -> None:
        """Give the optimizer of this rank its part of the state of an uncut model's. A collective.

        Args:
            names: of the parameters of each group, in the order of their indices; None if nobody wrote them down.

        Raises:
            ConfigurationError: the checkpoint's optimizer has other parameter groups, or states of another shape.
        """
        mine = sharded.names()
        known = sharded.order.names if sharded.order else ()
        order = in_order(known, [groups for (groups,) in self._to_all((mine,))], self.whole)
        saved = [group["params"] for group in whole["param_groups"]]
        if [len(group) for group in order] != [len(group) for group in saved]:
            raise ConfigurationError(
                f"the checkpoint's optimizer has parameter groups of {[len(group) for group in saved]} parameters, "
                f"this one of {[len(group) for group in order]}; resume with the optimizer that was saved"
            )
        if names is None and sharded.order is not None:
            names = sharded.order.of_given([group.get("param_names", ()) for group in whole["param_groups"]])
        if names is not None:
            order = _the_same_groups(order, names)
        saved_index = {n: i for names, ids in zip(order, saved, strict=True) for n, i in zip(names, ids, strict=True)}
        states = {name: whole["state"][index] for name, index in saved_index.items() if index in whole["state"]}
        check_states(states, self.shape_of, spread=self.rows.__contains__, elementwise=sharded.elementwise)
        sharded.cut(also=frozenset(states))
        owned = [[name for name in group if name in sharded.shards] for group in mine]
        position = {name: index for index, name in enumerate(name for group in owned for name in group)}
        local = {
            position[name]: {
                key: self._part_of(name, key, value, sharded.shards[name].elements)
                for key, value in states[name].items()
            }
            for name in position
            if name in states
        }
        local = self._read(local, states)
        groups = [
            # the names that the user gave stay those of this run, and of this rank
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": [position[n] for n in ns],
            }
            for group, ns in zip(whole["param_groups"], owned, strict=True)
        ]
        with sharded.in_place():
            sharded.optimizer.load_state_dict({"state": local, "param_groups": groups})

    def whole_main_weights(self, optimizers: Iterable[ShardedOptimizer]) -> dict[str, Tensor]:
        """On rank 0 the main weights of the uncut model, by the first names of their parameters. A collective."""
        shards = {n: s for sharded in optimizers for n, s in sharded.shards.items() if s.is_main_weight}
        mine = {name: (_to_cpu(shard.stepped), shard.elements) for name, shard in shards.items()}
        collected = Collected(self.shape_of)
        for part, rows in self._from_all((mine, self.rows)):
            for first, (values, elements) in part.items():
                collected.add(first, {"weight": values}, rows.get(first), elements)
        found = collected.states
        return {name: found[name]["weight"] for name in self.whole if name in found}

    def load_main_weights(self, optimizers: Iterable[ShardedOptimizer], whole: Mapping[str, Tensor]) -> None:
        """Where a checkpoint has none, parameters will do: a main weight follows what is written to its parameter."""
        shards = {n: s for sharded in optimizers for n, s in sharded.shards.items() if s.is_main_weight and n in whole}
        mine = {name: self._part_of(name, "weight", whole[name], shard.elements) for name, shard in shards.items()}
        for name, weight in self._read(mine, whole).items():
            shards[name].stepped.data.copy_(weight)

    # ---- helpers ------------------------------------------------------------------------------

    def _part_of(self, first: str, key: str, value: Any, elements: range | None) -> Any:
        return part_of(key, value, self.shape_of(first), self.rows.get(first), elements)

    def _rows_of(self, first: str, value: Any) -> Any:
        """This rank's rows of a whole tensor."""
        rows = self.rows.get(first)
        return value if rows is None else value[rows.start : rows.stop]

    def _read(self, mine: dict[Any, Any], whole: Mapping[str, Any]) -> dict[Any, Any]:
        """If ``whole`` is in a directory, only what is ``mine`` of it comes into memory. A collective then."""
        stored = stored_in(whole)
        return mine if stored is None else read(mine, stored, self.group)

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
            if isinstance(whole.get(name), Tensor | StoredTensor) and tuple(whole[name].shape) != tuple(spec.shape)
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


def _the_same_groups(order: list[list[str]], saved: Sequence[Sequence[str]]) -> list[list[str]]:
    """The groups of this run's optimizer, each in the order in which it was saved."""
    problems = [
        f"group {index}: {', '.join(sorted(set(here) ^ set(there))[:4])} in one of them only"
        for index, (here, there) in enumerate(zip(order, saved, strict=True))
        if set(here) != set(there)
    ]
    if problems:
        remedy = "resume with the optimizer that was saved"
        raise ConfigurationError.of(f"the checkpoint's optimizer has other parameters; {remedy}", problems)
    return [list(group) for group in saved]
