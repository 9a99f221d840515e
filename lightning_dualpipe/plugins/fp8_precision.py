"""``Trainer(plugins=[FP8Precision()])``: matrix multiplications in FP8, everything else as Lightning does it.

    layers that multiply in FP8    chosen by ``precision.selection``, computed by a backend of ``precision.backends``
    all the rest                   one of Lightning's own precisions, ``weights``

A layer keeps its class, its parameters and their names: a checkpoint does not say how it was trained. From the end of
a run on, the module multiplies as it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.backends import BACKENDS, BackendChoice, choose_backend
from lightning_dualpipe.precision.convert import convert, restore
from lightning_dualpipe.precision.fp8_rows import round_expert_tokens, travels_exactly
from lightning_dualpipe.precision.matmul import Backend
from lightning_dualpipe.precision.recipe import BF16, MXFP8, Recipe, recipe_of
from lightning_dualpipe.precision.selection import Selection, select

__all__ = ["FP8Precision"]

Weights = Literal["bf16-true", "32-true", "64-true", "bf16-mixed"]
Dispatch = Literal["auto", "fp8", "bf16"]


class FP8Precision(Precision):
    """Linear layers and experts multiply in FP8, forward and backward (DeepSeek-V3 report, section 3.3).

    Embedding, output head, router, norms and the attention core stay in high precision, and so does what sizes rule
    out; what was chosen, and why, is logged.

    Args:
        recipe: ``block`` (the report's), ``current``, ``delayed`` (one scale per tensor; not in a pipeline),
            ``mxfp8`` (Blackwell) or ``bf16`` (none); a mapping with the name and settings, for instance
            ``{"name": "block", "scales": "float32"}``; or a ``Recipe``.
        backend: ``te`` (Transformer Engine), ``torch``, ``emulate`` (anywhere, slowly), or ``auto``: the best that
            runs on the device. On a GPU without kernels for the recipe that is none, which is warned of.
        weights: the precision of everything else, as the Trainer's ``precision``.
        dispatch: how tokens travel to experts that multiply in FP8, and gradients in backward: ``fp8`` or ``bf16``
            (that is, in ``weights``). ``auto``: in FP8 if the recipe lets them travel without loss.
        include: names of layers in the LightningModule, with ``*`` and ``?`` as in file names: these alone are
            converted, sensitive ones too. Default: all that are not sensitive.
        exclude: names of layers that stay as they are.

    Raises:
        ConfigurationError: an argument that no run could have.
    """

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe = "block",
        backend: Literal["auto", "te", "torch", "emulate"] = "auto",
        weights: Weights = "bf16-true",
        dispatch: Dispatch = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        problems = []
        for name, value, values in (
            ("backend", backend, BACKENDS),
            ("weights", weights, get_args(Weights)),
            ("dispatch", dispatch, get_args(Dispatch)),
        ):
            if value not in values:
                problems.append(f"{name}={value!r} is not one of {', '.join(values)}")
        include, exclude = () if include is None else include, () if exclude is None else exclude
        for name, patterns in (("include", include), ("exclude", exclude)):
            if not _are_names(patterns):
                problems.append(f"{name}={patterns!r} must be a list of names")
        try:
            self.recipe = recipe_of(recipe)
            if dispatch == "fp8" and isinstance(self.recipe, BF16):
                problems.append("dispatch='fp8' with recipe 'bf16', which has no FP8: choose one of them otherwise")
            elif dispatch == "fp8" and not travels_exactly(self.recipe):
                problems.append(
                    f"dispatch='fp8' with {self.recipe} would round tokens once more on their way; use recipe='block', "
                    "whose scales are powers of two, or dispatch='bf16'"
                )
        except ConfigurationError as error:
            problems.append(str(error))
        if problems:
            raise ConfigurationError.of("FP8Precision cannot be built", problems)
        self.precision: Weights = weights  # what others ask about is the rest
        self.backend: Backend | None = None
        """What computes the products of the run; None before and after it, and where nothing is in FP8."""
        self.selection: Selection | None = None
        """Which layers of the whole model they are, from when it has been looked at."""
        self._dispatch = dispatch
        self._multiple = 32 if isinstance(self.recipe, MXFP8) else 16
        self._wanted, self._include, self._exclude = backend, tuple(include), tuple(exclude)
        self._rest = _REST[weights]()
        self._looked_at: nn.Module | None = None
        self._converted: nn.Module | None = None
        self._said = ""

    def __repr__(self) -> str:
        given = {"recipe": self.recipe, "backend": self._wanted, "weights": self.precision}
        return f"FP8Precision({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # ---- what is converted, and by whom -------------------------------------------------------

    def choose(self, device: torch.device) -> BackendChoice:
        """Who computes on ``device``.

        Raises:
            MissingPackageError, ConfigurationError: what was asked for cannot run there.
        """
        return choose_backend(self._wanted, self.recipe, device, _DTYPES[self.precision])

    def look_at(self, module: nn.Module) -> None:
        """Choose the layers of a whole model, of which ``convert_module`` may then be given a part.

        Raises:
            ConfigurationError: there are none, or some that were asked for cannot be converted.
        """
        if isinstance(self.recipe, BF16):
            return
        self.selection = select(module, multiple=self._multiple, include=self._include, exclude=self._exclude)
        self._looked_at = module

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        module = self._rest.convert_module(module)
        self._give_back()
        device = _device_of(module)
        if isinstance(self._rest, MixedPrecision):
            self._rest.device = device.type
        choice = self.choose(device)
        if choice.name is None:
            if not isinstance(self.recipe, BF16):
                rank_zero_warn(f"nothing multiplies in FP8, but all in {self.precision}: {'; '.join(choice.reasons)}")
            return module
        if self._looked_at is not module:
            self.look_at(module)
        assert self.selection is not None
        names = self.selection.names
        self.backend = choice.build()
        convert(module, self.backend, lambda name, _: name in names)
        if self._dispatch != "bf16" and travels_exactly(self.recipe):
            experts = self.selection.experts
            round_expert_tokens(module, self.recipe, lambda name: any(e.startswith(f"{name}.") for e in experts))
        self._converted = module
        if self.selection.odd and not self._said:
            rank_zero_warn(
                f"{len(self.selection.odd)} layers multiply in {self.precision}, because kernels for FP8 take sizes "
                f"that are multiples of {self._multiple}: {self.selection.odd_sizes}; choose such sizes, or name the "
                "layers in exclude=… if it is meant"
            )
        self._say(f"FP8 by {self.recipe}, {choice}. It multiplies {self.selection}")
        return module

    def weights_changed(self) -> None:
        """For code that writes to weights past their counters, as ``weight.data.mul_()`` does, between two training
        forwards of one step: what is kept of them in FP8 is made again.
        """
        if self.backend is not None:
            self.backend.weights_changed()

    def _say(self, text: str) -> None:
        if text != self._said:  # once, not in every evaluation
            rank_zero_info(text)
        self._said = text

    def _give_back(self) -> None:
        if self._converted is not None:
            restore(self._converted)
            round_expert_tokens(self._converted, None)
        self._converted = self.backend = None

    @override
    def teardown(self) -> None:
        self._give_back()
        self._looked_at = None
        self._rest.teardown()

    # ---- everything else ----------------------------------------------------------------------

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._rest.tensor_init_context()

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self._rest.module_init_context()

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        with self._rest.forward_context(), nullcontext() if self.backend is None else self.backend.context():
            yield

    @override
    def convert_input(self, data: Any) -> Any:
        return self._rest.convert_input(data)

    @override
    def convert_output(self, data: Any) -> Any:
        return self._rest.convert_output(data)


def _are_names(patterns: object) -> bool:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        return False
    return all(isinstance(pattern, str) for pattern in patterns)


_REST: Mapping[str, Callable[[], Precision]] = {
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "32-true": Precision,
    "64-true": DoublePrecision,
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),  # of which device will be known
}
_DTYPES = {"32-true": torch.float32, "64-true": torch.float64}
_DTYPES |= dict.fromkeys(("bf16-true", "bf16-mixed"), torch.bfloat16)


def _device_of(module: nn.Module) -> torch.device:
    """Where it will compute: strategies convert a module before they move it."""
    trainer = module._trainer if isinstance(module, LightningModule) else None
    if trainer is not None:
        device: torch.device = trainer.strategy.root_device
        return device
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
