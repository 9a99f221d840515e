"""Cut the list of layers into stages, and the model down to what one rank needs.

    layers   embed  b0  b1 │ b2  b3  b4 │ b5  b6  b7 │ b8  norm mtp head
    stage         0        │     1      │     2      │        3

What a rank does not serve is replaced by a placeholder: names of what stays are still those
of the whole model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Layer, TensorSpec
from lightning_dualpipe.schedules import Placement
from lightning_dualpipe.schedules.balance import balanced_bounds

__all__ = ["Elsewhere", "Whole", "is_extra_state", "keep_only", "materialize", "partition", "uncut"]


def partition(layers: Sequence[Layer], placement: Placement) -> tuple[range, ...]:
    """Indices of the layers of each stage: contiguous, none empty, and what the busiest rank has as cheap as possible.

    Raises:
        ConfigurationError: there are fewer places to cut than stages.
    """
    num_stages = placement.num_stages
    blocks = _uncuttable_blocks(layers)
    if len(blocks) < num_stages:
        raise ConfigurationError(
            f"{num_stages} stages need at least {num_stages} layers to share out, the model has {len(blocks)} "
            f"(layers that must stay together counted once); use fewer pipeline ranks or a deeper model"
        )
    costs = [sum(layers[index].cost for index in block) for block in blocks]
    bounds = balanced_bounds(costs, num_stages, mirrored=placement.is_mirrored)
    return tuple(range(blocks[start].start, blocks[stop - 1].stop) for start, stop in pairwise(bounds))


def _uncuttable_blocks(layers: Sequence[Layer]) -> list[range]:
    starts = [index for index, layer in enumerate(layers) if index == 0 or not layer.with_previous]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True)]


class Elsewhere(nn.Module):
    """Stands where a module was that another rank holds; what it was is kept without its memory, for ``uncut``."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self._was = (module,)  # in a tuple, so that it is none of the model's modules

    @property
    def was(self) -> nn.Module:
        return self._was[0]

    def forward(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError(f"{self.name} is held by another rank; call the whole model, not a part of it")

    def extra_repr(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Whole:
    """What is known of the whole model before it is cut: enough to put it together again.

    ``tensors``: every name of the state dict, in order, with shape and dtype; extra states of modules are no part.
    ``same_as``: a name -> the first name of the same tensor (tied weights have several).
    ``stages_of``: the first name of a tensor -> the stages that use it.
    """

    tensors: Mapping[str, TensorSpec]
    same_as: Mapping[str, str]
    stages_of: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[Layer], stages: Sequence[range]) -> "Whole":
        """
        Raises:
            ConfigurationError: a parameter belongs to no layer, so that no rank would keep it.
        """
        users: dict[int, set[int]] = {}
        for stage, indices in enumerate(stages):
            for module in (module for index in indices for module in layers[index].modules):
                for tensor in (*module.parameters(), *module.buffers()):
                    users.setdefault(id(tensor), set()).add(stage)
        everything = model.state_dict(keep_vars=True).items()
        state = {name: value for name, value in everything if isinstance(value, Tensor) and not is_extra_state(name)}
        orphans = [name for name, tensor in state.items() if tensor.requires_grad and id(tensor) not in users]
        if orphans:
            raise ConfigurationError(
                f"{len(orphans)} parameters belong to no layer ({', '.join(orphans[:5])}{', …' * (len(orphans) > 5)}): "
                f"list their module in {type(model).__name__}.layers(), or in `modules` of the Layer that uses it"
            )
        first: dict[int, str] = {}
        same_as = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
        everywhere = set(range(len(stages)))
        return cls(
            tensors={name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()},
            same_as=same_as,
            stages_of={same_as[name]: tuple(sorted(users.get(id(t), everywhere))) for name, t in state.items()},
        )


def is_extra_state(name: str) -> bool:
    """Whether this entry of a state dict is what a module's ``get_extra_state`` says of itself."""
    return name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX


def keep_only(model: nn.Module, kept: Iterable[Layer], layers: Iterable[Layer]) -> None:
    """Replace, in place, the modules of ``layers`` that no layer of ``kept`` uses.

    A layer need not be a module of the model: what it is made of counts.
    """
    needed = _parts(kept)
    spare = _parts(layers) - needed
    dropped: dict[int, nn.Module] = {}
    for parent_name, parent in list(model.named_modules(remove_duplicate=False)):
        if id(parent) in dropped:
            continue
        for name, child in list(parent._modules.items()):
            if id(child) in spare and child is not None and not any(id(part) in needed for part in child.modules()):
                dropped |= {id(part): part for part in child.modules()}
                setattr(parent, name, Elsewhere(f"{parent_name}.{name}".lstrip("."), child))
    _forget(dropped.values())


def _forget(modules: Iterable[nn.Module]) -> None:
    """Move their tensors to the meta device: others may hold them too. Ties between them survive."""
    made: dict[int, nn.Parameter | Tensor] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    shape = torch.empty_like(parameter, device="meta")
                    made[id(parameter)] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty_like(buffer, device="meta"))


@contextmanager
def uncut(model: nn.Module, same_as: Mapping[str, str]) -> Iterator[dict[int, str]]:
    """Within, ``model`` has all the modules it had; parameters that are elsewhere are on the meta device.

    Yields the first names, by id, of the parameters that stand for those elsewhere.
    """
    held = {same_as[name]: parameter for name, parameter in model.named_parameters()}
    placeholders = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, Elsewhere)
    ]
    tied: list[tuple[nn.Module, str, nn.Parameter]] = []
    for parent, name, placeholder in placeholders:
        parent._modules[name] = placeholder.was
    try:
        stand_ins: dict[int, str] = {}
        put_back = {id(part) for _, _, placeholder in placeholders for part in placeholder.was.modules()}
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items() if id(module) in put_back else ():
                if parameter is not None:
                    first = same_as[f"{prefix}.{name}".lstrip(".")]
                    if first in held:
                        tied.append((module, name, parameter))
                        module._parameters[name] = held[first]
                    else:
                        stand_ins[id(parameter)] = first
        yield stand_ins
    finally:
        for module, name, parameter in tied:
            module._parameters[name] = parameter
        for parent, name, placeholder in placeholders:
            parent._modules[name] = placeholder


def _parts(layers: Iterable[Layer]) -> set[int]:
    return {id(part) for layer in layers for module in layer.modules for part in module.modules()}


def materialize(model: nn.Module, device: torch.device) -> bool:
    """Give memory on ``device`` to what is on the meta device; ties between parameters survive.

    Returns whether there was anything; the new tensors are uninitialised.
    """
    made: dict[int, nn.Parameter | Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                made.setdefault(id(buffer), torch.empty_like(buffer, device=device))
                module._buffers[name] = made[id(buffer)]
    return bool(made)
