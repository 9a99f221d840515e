"""Let an optimizer of any class step only on what this rank owns, and share the result (ZeRO-1).

    closure: forward, backward, sums over holders, hooks, clipping        whole parameters, as ever
    ─► this rank's shards take the parameters' places in ``param_groups``
    ─► the optimizer's own step                                           1/holders of the elements
    ─► the parameters come back; every owner shares its new values with the other holders

Outside the step ``param_groups`` lists the parameters as the user passed them: schedulers,
``zero_grad``, clipping and hooks see nothing unusual. Only ``optimizer.state`` is by shard.

A shard is one of three things:

    the parameter itself       this rank alone holds it, or owns it whole
    a view of its elements     sharing memory with the parameter: nothing to copy
    a main weight, float32     of a half-precision parameter with float32 gradients, which is its rounded copy

Somebody may write to a parameter between two steps (a checkpoint, weight averaging). Where it no
longer is its main weight, rounded, the main weight follows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import LBFGS, Optimizer

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.ownership import Ownership, slices, whole
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from lightning_dualpipe.parallel.share import share

__all__ = ["Shard", "ShardedOptimizer", "WholeOrder"]

# Whose update of an element depends on this element's history and gradient alone. These very classes: a subclass
# may do anything. Whatever is not listed gets whole parameters, which is right for every optimizer.
_ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in "Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD".split()
)


@dataclass(slots=True, eq=False)
class Shard:
    """What the optimizer steps on in place of ``parameter``.

    ``elements`` of the flat parameter; None if it has the shape of the whole parameter.
    """

    parameter: nn.Parameter
    elements: range | None
    stepped: nn.Parameter

    @classmethod
    def of(cls, parameter: nn.Parameter, elements: range | None) -> Shard:
        shard = cls(parameter, elements, parameter)
        if parameter.grad_dtype not in (None, parameter.dtype):
            shard.stepped = nn.Parameter(shard.here(parameter.data).to(parameter.grad_dtype, copy=True))
        elif elements is not None:
            shard.stepped = nn.Parameter(shard.here(parameter.data))
        return shard

    @property
    def is_main_weight(self) -> bool:
        return self.stepped.dtype != self.parameter.dtype

    def here(self, tensor: Tensor) -> Tensor:
        """This shard's part of a tensor that has the parameter's shape."""
        if self.elements is None:
            return tensor
        return tensor.reshape(-1)[self.elements.start : self.elements.stop]

    def state(self, value: Any) -> Any:
        """This shard's part of a value of the whole parameter's state."""
        if not isinstance(value, Tensor) or value.shape != self.parameter.shape:
            return value
        return self.here(value).to(
            self.stepped.dtype if value.dtype == self.parameter.dtype else value.dtype, copy=True
        )

    def load(self) -> None:
        """Gradient and, where they are new, values of the parameter."""
        if self.stepped is self.parameter:
            return
        if self.is_main_weight:
            values = self.here(self.parameter.data)
            written = values != self.stepped.to(values.dtype)
            self.stepped.copy_(torch.where(written, values.to(self.stepped.dtype), self.stepped))
        else:  # again: the parameter may have moved
            self.stepped.data = self.here(self.parameter.data)
        gradient = self.parameter.grad
        self.stepped.grad = None if gradient is None else self.here(gradient).to(self.stepped.dtype)

    def store(self) -> None:
        if self.stepped is self.parameter:
            return
        if self.is_main_weight:
            self.here(self.parameter.data).copy_(self.stepped)
        self.stepped.grad = None


@dataclass(frozen=True, slots=True)
class _Cut:
    """Parameters of one dtype with the same holders, shared out among them."""

    owned: Ownership
    group: dist.ProcessGroup
    parameters: Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class WholeOrder:
    """The parameters of each group of an optimizer of the uncut model, as torch numbers them: by name.

    ``given`` are the names that the user gave with the parameters, in the same order; empty without.
    """

    names: Sequence[Sequence[str]]
    given: Sequence[Sequence[str]]

    @classmethod
    def of(cls, optimizer: Optimizer, named: Mapping[int, str], stand_ins: Mapping[int, str]) -> WholeOrder:
        """Takes the parameters in ``stand_ins`` out of the optimizer, which stand for what other ranks hold.

        Args:
            named, stand_ins: names by the id of the parameter.
        """
        all_names = {**named, **stand_ins}
        names = [[all_names[id(p)] for p in group["params"] if id(p) in all_names] for group in optimizer.param_groups]
        given = [group.get("param_names", []) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            here = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in stand_ins]
            for parameter in group["params"]:
                if id(parameter) in stand_ins:
                    optimizer.state.pop(parameter, None)
            for key in {"params", "param_names"} & group.keys():
                group[key] = [group[key][index] for index in here]
        return cls(names, given)

    def of_given(self, given: Sequence[Sequence[str]]) -> list[list[str]] | None:
        """The names behind names that a user gave; None if they are not those given here, group by group."""
        if not any(given) or [sorted(group) for group in given] != [sorted(group) for group in self.given]:
            return None
        if any(len(set(group)) < len(group) for group in given):
            return None
        names = [dict(zip(*pair, strict=True)) for pair in zip(self.given, self.names, strict=True)]
        return [[known[name] for name in group] for known, group in zip(names, given, strict=True)]


class ShardedOptimizer:
    """Replaces ``optimizer.step`` until ``release``.

    Args:
        named: this rank's parameters by the names that ``replicas`` knows.
        before_step: called when a step is about to change what this rank keeps.

    All holders of a parameter make one for it, and step equally often.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named: Callable[[], Mapping[str, nn.Parameter]],
        replicas: ReplicaGroups,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        if isinstance(optimizer, LBFGS):
            raise ConfigurationError(
                "LBFGS multiplies the gradients of all parameters with one another, and no rank holds all of them; "
                "use an optimizer that updates each parameter by itself"
            )
        self.optimizer = optimizer
        self.shards: dict[str, Shard] = {}
        """By name, of those parameters that this rank owns at least a part of."""
        self.order: WholeOrder | None = None
        """As far as it is known: parameters may have come later."""
        says_so = vars(type(optimizer)).get("elementwise", False)  # of its own class: a subclass may do anything
        self.elementwise = type(optimizer) in _ELEMENTWISE or says_so
        """Whether the states of a parameter have its shape, or are one number."""
        self._named, self._replicas, self._before_step = named, replicas, before_step
        self._known: set[str] = set()
        self._cuts: list[_Cut] = []
        self._own_step: Callable[..., Any] | None = None
        self.take_over()
        # whoever asks the optimizer itself for its state gets that of this rank's shards
        shards_in_place = ExitStack()
        optimizer.register_state_dict_pre_hook(lambda _: shards_in_place.enter_context(self.in_place()))
        optimizer.register_state_dict_post_hook(lambda *_: shards_in_place.close())

    def take_over(self) -> None:
        if self._own_step is not None:
            return
        self._own_step = own_step = self.optimizer.step

        @functools.wraps(own_step)  # with the marks that learning rate schedulers leave on it
        def step(_: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            result = None
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            self._step(functools.partial(own_step, *args, **kwargs))
            return result

        vars(self.optimizer)["step"] = MethodType(step, self.optimizer)  # schedulers made later wrap a method

    def release(self) -> None:
        """The optimizer's own step again; states stay as they are."""
        if self._own_step is not None:
            vars(self.optimizer)["step"] = self._own_step
            self._own_step = None

    def names(self) -> list[list[str]]:
        """Of the parameters of each group."""
        names = self._names()
        return [[names[id(parameter)] for parameter in group["params"]] for group in self.optimizer.param_groups]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The optimizer with this rank's shards as its parameters: what its state belongs to."""
        names = self._names()
        before = [group["params"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["params"] = [each for parameter in group["params"] for each in self._stepped(names, parameter)]
        try:
            yield
        finally:  # loading a state makes new groups
            for group, parameters in zip(self.optimizer.param_groups, before, strict=True):
                group["params"] = parameters

    def cut(self, also: frozenset[str] = frozenset()) -> None:
        """Share out the parameters that are new, and trained or among ``also``; owners stay what they are.

        Frozen ones wait until they are trained: they have no states, and would only make shares unequal.
        """
        names = self._names()
        new = {
            names[id(parameter)]: parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in names
            and names[id(parameter)] not in self._known
            and (parameter.requires_grad or names[id(parameter)] in also)
        }
        self._known |= new.keys()
        alone = dict(new)
        for group, members in self._replicas.by_group(new):
            for dtype in sorted({new[name].dtype for name in members}, key=str):
                self._share_out({name: alone.pop(name) for name in members if new[name].dtype == dtype}, group)
        self.shards |= {name: Shard.of(parameter, None) for name, parameter in alone.items()}
        for name, parameter in new.items():
            self._hand_over_state(parameter, self.shards.get(name))

    def _share_out(self, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        owned = (slices if self.elementwise else whole)(sizes, group.size())
        for parameter in parameters.values():
            parameter.data = parameter.data.contiguous()  # so that its elements can be seen as one line
        for name, start, stop in owned[group.rank()]:
            elements = range(start, stop) if self.elementwise else None
            self.shards[name] = Shard.of(parameters[name], elements)
        self._cuts.append(_Cut(owned, group, parameters))

    def _hand_over_state(self, parameter: nn.Parameter, shard: Shard | None) -> None:
        """Some optimizers make states with the parameters they are given (Adagrad); only shards have states."""
        if parameter in self.optimizer.state and (shard is None or shard.stepped is not parameter):
            state = self.optimizer.state.pop(parameter)
            if shard is not None:
                self.optimizer.state[shard.stepped] = {key: shard.state(value) for key, value in state.items()}

    def _step(self, own_step: Callable[[], Any]) -> None:
        self._before_step()
        self.cut()
        with torch.no_grad():
            for shard in self.shards.values():
                shard.load()
        with self.in_place():
            own_step()
        with torch.no_grad():
            for shard in self.shards.values():
                shard.store()
        for cut in self._cuts:
            flats = {name: parameter.data.view(-1) for name, parameter in cut.parameters.items()}
            share(flats, cut.owned, cut.group, self._replicas.bucket_bytes)
        # ``.data`` is written to behind the counter of writes, by which others know whether what they keep is stale
        increment_version([shard.parameter for shard in self.shards.values()])
        increment_version([parameter for cut in self._cuts for parameter in cut.parameters.values()])

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self._named().items()}

    def _stepped(self, names: Mapping[int, str], parameter: nn.Parameter) -> list[nn.Parameter]:
        """In place of ``parameter``: nothing if others own it, or it is frozen; itself if it is none of the model's."""
        name = names.get(id(parameter))
        if name is None:
            return [parameter]
        return [self.shards[name].stepped] if name in self.shards else []
