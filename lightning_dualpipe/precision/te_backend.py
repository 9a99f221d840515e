"""FP8 by Transformer Engine (2.8 and newer): fused quantisers and block-scaled matrix multiplications on NVIDIA GPUs.

    layer ─► matmul of ours ─► pad rows ─► lend the weight ─► hidden te.Linear / te.GroupedLinear ─► take rows back

A hidden module computes and owns nothing: for one call it is lent the layer's weight (of a stack of experts,
one view for each), so parameters, names and state dicts stay as they are. Its modules, and not its quantisers
and ``general_gemm``, because the modules are its interface: from 2.8 to 2.20 they have only gained arguments,
while those of ``general_gemm`` and ``general_grouped_gemm`` changed places in 2.10 and 2.11.

Where weight gradients go, and when, says ``te_weight``.

Quantised weights are kept between two steps of the optimizer (``fp8_weight`` says for how long). The modules
are always told ``is_first_microbatch=False``, and what they keep is cleared instead when a weight has changed:
told True, they would overwrite ``main_grad`` with that microbatch's gradient, whichever came before it.

This is the only file that knows the library, and it imports it where it is used.

Shapes: R rows (tokens), E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.precision.emulate import without_kernels
from lightning_dualpipe.precision.fp8_weight import Epoch, WeightState
from lightning_dualpipe.precision.padding import pad_rows, unpad_rows
from lightning_dualpipe.precision.recipe import MXFP8, Block, Current, Delayed, Recipe
from lightning_dualpipe.precision.te_weight import LentWeight
from lightning_dualpipe.precision.weight_gradients import autocast_to, check_dtypes

__all__ = ["TEBackend", "why_not_te"]


def why_not_te(recipe: Recipe) -> str | None:
    """What stands against it here, with what would help; None if nothing does."""
    if _NEEDS.get(type(recipe)) is None:
        return f"Transformer Engine is not needed for recipe {recipe.name!r}, which quantises nothing"
    if find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed; {_INSTALL}, or use {without_kernels(recipe)}"
    if not torch.cuda.is_available():
        return f"Transformer Engine needs a CUDA device, and torch sees none here; use {without_kernels(recipe)}"
    needs = _NEEDS[type(recipe)]
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (SM{major}{minor})"
    if (major, minor) < needs.capability:
        return f"recipe {recipe.name!r} needs {needs.hardware}, and this is {name}; {needs.instead}"
    if isinstance(recipe, Block):
        cuda = torch.version.cuda or "none"
        if _numbers(cuda) < (12, 9):
            return (
                f"recipe 'block' needs a torch built for CUDA 12.9 or newer, and this one is for {cuda}; "
                "install such a torch, or use recipe='current'"
            )
        if major >= 10 and recipe.scales == "float32":
            return (
                f"on {name} block scaling is computed as MXFP8, whose scales are powers of two; "
                "use scales='power_of_two'"
            )
    try:
        available, reason = _availability(needs.question)
    except Exception as error:  # it loads CUDA libraries and asks drivers: whatever goes wrong is a reason
        return f"Transformer Engine cannot be used here: {type(error).__name__}: {error}"
    return None if available else f"Transformer Engine refuses recipe {recipe.name!r} on {name}: {reason}"


class TEBackend:
    """Linear layers and stacks of experts whose row counts are anything, and sizes multiples of 16 (MXFP8: 32).

    Raises:
        MissingPackageError: Transformer Engine is not installed.
        ConfigurationError: this device, or this build of torch, cannot compute by the recipe.
    """

    name = "te"

    def __init__(self, recipe: Recipe) -> None:
        refused = why_not_te(recipe)
        if refused is not None:
            raise (ConfigurationError if find_spec("transformer_engine") else MissingPackageError)(refused)
        self._settings = _Settings(recipe)

    def linear(self) -> TELinear:
        return TELinear(self._settings)

    def grouped_linear(self) -> TEGroupedLinear:
        return TEGroupedLinear(self._settings)

    def weights_changed(self) -> None:
        self._settings.epoch.number += 1

    def context(self) -> AbstractContextManager[object]:
        """For recipe ``delayed``, whose history grows when this is left: without it with each product, and so it would
        remember fewer steps. Other recipes have no use for it.
        """
        return self._settings.quantising() if isinstance(self._settings.recipe, Delayed) else nullcontext()


# ---- matmuls ----------------------------------------------------------------------------------


class TELinear:
    """The matmul of one layer."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._hidden = _Hidden(settings)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, queue: WeightGradients | None) -> Tensor:
        check_dtypes(x, weight)
        rows_RI = autocast_to(x).reshape(-1, x.shape[-1])
        multiple, count = self._settings.multiple, len(rows_RI)
        # the gradient of the weight sums over rows, in steps of ``multiple``; a product without rows is no product
        missing = -count % multiple if count else multiple
        y_RO = self._hidden(F.pad(rows_RI, (0, 0, 0, missing)) if missing else rows_RI, weight, queue)
        y_RO = y_RO[:count] if missing else y_RO
        if bias is not None:  # delayed by Transformer Engine, only its first microbatch would count
            y_RO = y_RO + bias.to(y_RO.dtype)
        return y_RO.view(*x.shape[:-1], y_RO.shape[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer gets a module of its own."""
        return TELinear, (self._settings,)


class TEGroupedLinear:
    """The matmul of one stack of experts. It must know the counts on the host: on a GPU, it waits for them."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._hidden = _Hidden(settings)

    def __call__(
        self, x_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int] | Tensor, queue: WeightGradients | None
    ) -> Tensor:
        counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
        assert len(counts) == len(weight_EOI), f"{len(counts)} counts for {len(weight_EOI)} experts"
        check_dtypes(x_RI, weight_EOI)
        rows_RI = autocast_to(x_RI)
        padded_RI, padded = pad_rows(rows_RI, counts, self._settings.multiple)
        if not any(padded):  # nobody has rows, and yet every gradient shall be zeros, not none
            padded = [self._settings.multiple, *padded[1:]]
            padded_RI = F.pad(padded_RI, (0, 0, 0, padded[0]))
        y_RO = self._hidden(padded_RI, weight_EOI, queue, padded)
        return unpad_rows(y_RO, counts, self._settings.multiple) if any(counts) else y_RO[:0]

    def __reduce__(self) -> tuple[Any, ...]:
        return TEGroupedLinear, (self._settings,)


@dataclass(eq=False)
class _Settings:
    """What all matmuls of a backend share."""

    recipe: Recipe
    epoch: Epoch = field(default_factory=Epoch)

    def __post_init__(self) -> None:
        self._theirs = _their_recipe(self.recipe)
        self.multiple = 32 if isinstance(self.recipe, MXFP8) else 16
        self.keeps_weights = not isinstance(self.recipe, Delayed)  # which learns from each quantisation

    def quantising(self) -> AbstractContextManager[object]:
        """Inside of each call, so that what is computed again for a backward is quantised again."""
        import transformer_engine.pytorch as te

        if hasattr(te, "autocast"):  # 2.9
            return te.autocast(enabled=True, recipe=self._theirs)
        return te.fp8_autocast(enabled=True, fp8_recipe=self._theirs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Settings, (self.recipe, self.epoch)


class _Hidden:
    """A module of Transformer Engine, made for the first weight it is given."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        self._module: Any = None
        self._made_for: object = None
        self._kept_of: WeightState | None = None
        self._kept_for: object = None

    def __call__(self, x_RI: Tensor, weight: Tensor, queue: WeightGradients | None, *counts: list[int]) -> Tensor:
        module = self._module_for(weight, x_RI)
        use = LentWeight(module, weight, queue)
        lent = use.lend()
        names = [f"weight{index}" for index in range(len(lent))] if weight.dim() == 3 else ["weight"]
        own = vars(module)  # past ``nn.Module``, which would want parameters
        own.update(zip(names, lent, strict=True))
        module.train(torch.is_grad_enabled())
        with self._delaying(module):
            try:
                with self.settings.quantising():
                    y_RO: Tensor = module(x_RI, *counts, is_first_microbatch=self._is_first(module, weight, x_RI))
            finally:
                for name in names:
                    own.pop(name, None)
        use.watch(y_RO, lent)
        return y_RO

    @contextmanager
    def _delaying(self, module: Any) -> Iterator[None]:
        """A backward that may delay must have been told so by its forward.

        Set back at the end: a forward may run again in the middle of the backward that has asked for it.
        """
        store = module.wgrad_store
        before = store.delay_wgrad_compute()
        store.enable_delay_wgrad_compute()
        try:
            yield
        finally:
            (store.enable_delay_wgrad_compute if before else store.disable_delay_wgrad_compute)()

    def _is_first(self, module: Any, weight: Tensor, x_RI: Tensor) -> bool | None:
        """False: use what is kept. None: quantise the weight anew, and keep nothing."""
        if not (self.settings.keeps_weights and torch.is_grad_enabled() and isinstance(weight, nn.Parameter)):
            return None
        # where ``x`` wants no gradient only W is made, and of block-scaled weights no version up to 2.20 notices later
        # that W^T is missing
        use, epoch = (x_RI.requires_grad, x_RI.dtype), self.settings.epoch
        if use != self._kept_for or self._kept_of is None or not self._kept_of.is_of(weight, epoch):
            module._fp8_workspaces.clear()
            self._kept_of, self._kept_for = WeightState(weight, epoch), use
        return False

    def _module_for(self, weight: Tensor, x_RI: Tensor) -> Any:
        kind = (weight.shape, weight.dtype, weight.device)
        if kind != self._made_for:
            _check_sizes(weight, x_RI, self.settings)
            self._module, self._made_for, self._kept_of = _make(weight), kind, None
        return self._module


# ---- the library ------------------------------------------------------------------------------


_INSTALL = "pip install 'lightning-dualpipe[te]' on a machine with CUDA"


@dataclass(frozen=True)
class _Needs:
    capability: tuple[int, int]
    hardware: str
    question: str  # the function of Transformer Engine that knows
    instead: str


_PER_TENSOR = _Needs((8, 9), "an Ada GPU or newer", "is_fp8_available", "use recipe='bf16'")
_NEEDS: dict[type[Recipe], _Needs] = {
    Block: _Needs((9, 0), "a Hopper GPU or newer", "is_fp8_block_scaling_available", "use 'current' or 'bf16'"),
    Current: _PER_TENSOR,
    Delayed: _PER_TENSOR,
    MXFP8: _Needs((10, 0), "a Blackwell GPU", "is_mxfp8_available", "use recipe='block' on Hopper"),
}


def _availability(question: str) -> tuple[bool, str]:
    import transformer_engine.pytorch as te

    if hasattr(te, question):  # 2.9
        answer: tuple[bool, str] = getattr(te, question)(return_reason=True)
        return answer
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    answer = getattr(FP8GlobalStateManager, question)()
    return answer


def _their_recipe(recipe: Recipe) -> Any:
    """Scales are set after construction: ``use_f32_scales`` is read from the environment, at import, only."""
    from transformer_engine.common import recipe as theirs

    made: Any
    if isinstance(recipe, MXFP8):
        return theirs.MXFP8BlockScaling(fp8_format=theirs.Format.E4M3)
    if isinstance(recipe, Delayed):
        # its largest values stay on their rank: a reduction at the end of each region would be a collective of the
        # whole world, which ranks with other layers or other tokens never reach together
        format = theirs.Format.HYBRID if recipe.gradient_format == "e5m2" else theirs.Format.E4M3
        return theirs.DelayedScaling(fp8_format=format, amax_history_len=recipe.history, reduce_amax=False)
    if isinstance(recipe, Current):
        format = theirs.Format.HYBRID if recipe.gradient_format == "e5m2" else theirs.Format.E4M3
        made, powers_of_two = theirs.Float8CurrentScaling(fp8_format=format), False
    else:
        assert isinstance(recipe, Block), f"{recipe} has no counterpart"
        made, powers_of_two = theirs.Float8BlockScaling(fp8_format=theirs.Format.E4M3), recipe.scales == "power_of_two"
    made.fp8_quant_fwd_inp = theirs.QParams(power_2_scale=powers_of_two, amax_epsilon=0.0)
    made.fp8_quant_fwd_weight = theirs.QParams(power_2_scale=powers_of_two, amax_epsilon=0.0)
    made.fp8_quant_bwd_grad = theirs.QParams(power_2_scale=powers_of_two, amax_epsilon=0.0)
    return made


def _make(weight: Tensor) -> nn.Module:
    """On the meta device: its own weights are never read."""
    import transformer_engine.pytorch as te

    *experts, outputs, inputs = weight.shape
    if experts:
        return te.GroupedLinear(
            *experts,
            inputs,
            outputs,
            bias=False,
            params_dtype=weight.dtype,
            device="meta",
            fuse_wgrad_accumulation=True,
            delay_wgrad_compute=True,
        )
    return te.Linear(
        inputs,
        outputs,
        bias=False,
        params_dtype=weight.dtype,
        device="meta",
        fuse_wgrad_accumulation=True,
        delay_wgrad_compute=True,
    )


def _check_sizes(weight: Tensor, x_RI: Tensor, settings: _Settings) -> None:
    outputs, inputs = weight.shape[-2:]
    if inputs % settings.multiple or outputs % settings.multiple:
        raise ConfigurationError(
            f"a weight of {outputs} outputs and {inputs} inputs: recipe {settings.recipe.name!r} multiplies sizes that "
            f"are multiples of {settings.multiple}; exclude the layer"
        )
    if x_RI.dtype == torch.float64:
        raise ConfigurationError(
            "Transformer Engine computes in float32 at most, and this layer is given float64; use backend='emulate'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
