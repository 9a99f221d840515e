"""Lets a program that imports only ``lightning`` write ``Trainer(strategy="dualpipe")``.

    import torch ──► entry point in the group "torch.backends" ──► autoload()
                                                                      │ leaves a finder on sys.meta_path
    import lightning.pytorch.strategies ──► the finder ──► the module as always, then its registry
                                                           learns the names of STRATEGIES

Lightning has no entry points for strategies. PyTorch's group is the only one that is always run
before a Trainer exists, and every ``import torch`` has to bear it: so this file is standard library
alone and adds 0.6 ms to an import of seconds (median of 40 runs on a busy 2-core machine; 2 ms where
Python may not keep compiled files). What the names stand for is imported when a Trainer asks for it.
With ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` PyTorch does not run the entry point; then
``import lightning_dualpipe`` does the same by hand.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from lightning_dualpipe.strategy import DualPipeStrategy

STRATEGIES = {
    "dualpipe": "bidirectional pipeline of DeepSeek-V3 with expert parallelism; every stage lives on two ranks",
    "dualpipev": "the same schedule folded into a V: every stage lives on one rank",
}
LIGHTNING = "lightning.pytorch.strategies"
MIRROR = "pytorch_lightning.strategies"  # the same classes built a second time: a Trainer takes only its own


def autoload() -> None:
    """What the entry point calls. Whatever happens, ``import torch`` goes on."""
    try:
        install()
    except Exception as error:
        _warn(error)


def install() -> None:
    """Register the strategies with every Lightning that is imported already, and with those to come."""
    for name in (LIGHTNING, MIRROR):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "StrategyRegistry"):  # else it is being imported just now
            register(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(strategies: ModuleType) -> None:
    """Add the names to the registry of a Lightning; the second time changes nothing."""
    make = make_strategy if strategies.__name__ == LIGHTNING else refuse_mirror
    for name, description in STRATEGIES.items():
        if name not in strategies.StrategyRegistry:
            strategies.StrategyRegistry.register(name, make, description=description, schedule=name)


def make_strategy(**options: Any) -> DualPipeStrategy:
    from lightning_dualpipe.strategy import DualPipeStrategy

    return DualPipeStrategy(**options)


def refuse_mirror(*, schedule: str) -> None:
    from lightning_dualpipe.errors import ConfigurationError

    raise ConfigurationError(
        f"strategy={schedule!r} was given to a Trainer of pytorch_lightning; it works with the package lightning: "
        "write `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`"
    )


class _Finder:
    """Finds nothing by itself: it puts a ``_Loader`` around the loader the other finders give."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in (LIGHTNING, MIRROR):
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # a loader by behaviour
        return spec


class _Loader:
    """Loads as ``loader`` does, then registers. The module keeps no trace of it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        try:
            register(module)
        except Exception as error:
            _warn(error)

    def __getattr__(self, name: str) -> Any:  # for tools that look at a module without importing it
        return getattr(self.loader, name)


def _warn(error: Exception) -> None:
    try:
        warnings.warn(f"lightning-dualpipe could not register its strategies: {error!r}", stacklevel=3)
    except Warning:  # under -W error: still no reason to break somebody's import
        sys.stderr.write(f"lightning-dualpipe could not register its strategies: {error!r}\n")
