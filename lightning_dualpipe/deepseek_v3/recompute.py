"""What backward computes again instead of keeping (technical report, section 3.2.3).

``"selective"``, the report's way: outputs that are wide and cheap. ■ is kept, □ is forgotten:

    h ─► norm ─► q_a, kv_a ─► norm ─► q_b, kv_b ─► q k v ─► softmax ─► o_proj
    ■     □          ■          □                    □         ■
    h ─► norm ─► gate, up ─► SwiGLU ─► down          of a layer, of shared and of routed experts
    ■     □          ■         □

``"selective_fp8"`` keeps of a mixture of experts what enters its SwiGLUs, and what enters the experts if
it came in FP8, in FP8 (section 3.3.3), in half the memory of BF16. Forward does not change. Backward sees
what is left of SwiGLU's inputs; tokens that came in FP8 lose nothing.

``"full"``: a phase that computes keeps its inputs only, and runs again before its backward.

None communicates again, and a router counts its tokens once (``interface.is_recomputing``).

How things are forgotten. ``rebuilt(f, x)`` is ``f(x)``, and inside of a phase also a note on how its
memory came about. Whatever saves a piece of that memory for backward saves the note instead, torch's
own functions as well as ours. In backward the first one to ask computes ``f(x)`` again, the last one
frees it. ``x`` may be forgotten too. The same functions see the same inputs, so the bits are the same.

A weight gradient that waits holds what backward has rebuilt, not what it would be rebuilt from: of
SwiGLU that is half, of a norm or an up-projection as much.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_dualpipe.interface import Phase, Values, recomputing
from lightning_dualpipe.precision.fp8_rows import FP8Rows
from lightning_dualpipe.precision.recipe import Block

__all__ = ["Recompute", "compute_phase", "forgets", "kept_in_fp8", "rebuildable", "rebuilt"]

Recompute = Literal["none", "selective", "selective_fp8", "full"]
_T = TypeVar("_T", Tensor, tuple[Tensor, Tensor])


def compute_phase(
    name: str,
    run: Callable[..., Any],
    recompute: Recompute,
    *,
    takes_batch: bool = False,
    skips: int = 0,
    takes: int | None = None,
) -> Phase:
    """A phase that computes, and for its backward keeps as much as ``recompute`` says."""
    if recompute in ("selective", "selective_fp8"):
        run = _forgetful(run, in_fp8=recompute == "selective_fp8")
    return Phase(name, run, takes_batch=takes_batch, skips=skips, takes=takes, recompute=recompute == "full")


def rebuilt(function: Callable[..., _T], *inputs: Tensor) -> _T:
    """``function(*inputs)``, which in a phase that forgets is not kept for backward."""
    return rebuildable(function(*inputs), function, *inputs)


def rebuildable(value: _T, function: Callable[..., _T], *inputs: Tensor) -> _T:
    """``value``, of which is known that ``function(*inputs)`` gives the same bits."""
    notes = _NOTES.get()
    if notes is not None:
        notes.add(value if isinstance(value, tuple) else (value,), function, inputs)
    return value


def kept_in_fp8(x: Tensor, rows: FP8Rows | None = None) -> Tensor:
    """``x`` [.., D], which a phase that keeps values in FP8 keeps so: backward sees what is left of it.

    ``rows``: the grid. Default: that of activations in ``precision.recipe.Block``.
    """
    notes = _NOTES.get()
    if notes is None or not notes.in_fp8:
        return x
    rows = rows or _ROWS
    x = x.contiguous()  # as what takes its place will be
    values, scales = rows.encode(x.detach().flatten(0, -2))
    return rebuildable(x, partial(_decoded, rows, x.shape, x.dtype), values, scales)


def _decoded(rows: FP8Rows, shape: torch.Size, dtype: torch.dtype, values: Tensor, scales: Tensor) -> Tensor:
    return rows.decode(values, scales, dtype).view(shape)


_ROWS = FP8Rows(Block().activation)


def forgets() -> bool:
    """Whether this runs in a phase that forgets."""
    return _NOTES.get() is not None


def _forgetful(run: Callable[..., Values], *, in_fp8: bool) -> Callable[..., Values]:
    @wraps(run)
    def forgetting(*values: Any, **batch: Any) -> Values:
        if not torch.is_grad_enabled():
            return run(*values, **batch)
        notes = _Notes(in_fp8)
        token = _NOTES.set(notes)
        try:
            with saved_tensors_hooks(notes.pack, _unpack):
                return run(*values, **batch)
        finally:
            _NOTES.reset(token)

    return forgetting


@dataclass(slots=True, eq=False)
class _Recipe:
    """How to compute the outputs of ``function`` again, and whether somebody will still ask for them."""

    function: Callable[..., Any]
    inputs: tuple[Tensor | _Piece, ...]
    autocast: AbstractContextManager[object]
    num_waiting: int = 0
    _outputs: tuple[Tensor, ...] | None = None

    def outputs(self) -> tuple[Tensor, ...]:
        outputs = self._cook() if self._outputs is None else self._outputs
        self.num_waiting -= 1  # below zero where a graph is used twice: then nothing is held
        self._outputs = outputs if self.num_waiting > 0 else None
        return outputs

    @torch.no_grad()
    def _cook(self) -> tuple[Tensor, ...]:
        inputs = [_unpack(kept) for kept in self.inputs]
        with recomputing(), self.autocast:
            made = self.function(*inputs)
        return made if isinstance(made, tuple) else (made,)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A view of the memory of a recipe's output: what is saved in place of a tensor."""

    recipe: _Recipe
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _Origin:
    recipe: _Recipe
    index: int
    dtype: torch.dtype
    version: int
    storage: StorageWeakRef  # as long as it exists, no other memory gets the same key


@dataclass(slots=True)
class _Notes:
    """Where memory came from, in one run of a phase."""

    in_fp8: bool = False
    _origins: dict[int, _Origin] = field(default_factory=dict)

    def add(self, outputs: tuple[Tensor, ...], function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        known = {_key(tensor) for tensor in inputs} | self._origins.keys()
        if all(_key(output) in known for output in outputs):
            return  # a cast to the type that it had
        recipe = _Recipe(function, tuple(self.pack(x.detach()) for x in inputs), _autocast_now(outputs[0]))
        for index, output in enumerate(outputs):
            storage = StorageWeakRef(output.untyped_storage())
            self._origins[_key(output)] = _Origin(recipe, index, output.dtype, output._version, storage)

    def pack(self, tensor: Tensor) -> Tensor | _Piece:
        origin = self._origins.get(_key(tensor))
        # written to since, or read as another type: then it is kept
        if origin is None or origin.dtype != tensor.dtype or origin.version != tensor._version:
            return tensor
        origin.recipe.num_waiting += 1
        return _Piece(origin.recipe, origin.index, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _Piece) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.outputs()[kept.index].as_strided(kept.size, kept.stride, kept.offset)


_NOTES: ContextVar[_Notes | None] = ContextVar("notes of the phase that runs", default=None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _autocast_now(tensor: Tensor) -> AbstractContextManager[object]:
    """What surrounds us, for later: backward runs outside of it."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device) if enabled else None, enabled=enabled)
