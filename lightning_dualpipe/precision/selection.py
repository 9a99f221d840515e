"""Which layers are to multiply in FP8: where the work is, and not where the rounding would be felt.

The report keeps embedding, output head, gating, norms and the attention core in high precision (section 3.3.1).
Of these only heads are linear layers. A model that follows ``interface.KeepsHighPrecision`` names its own; of any
other the last linear layer is taken for the head, and a layer that shares the weight of an embedding for another.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import KeepsHighPrecision
from lightning_dualpipe.precision.linear import is_plain
from lightning_dualpipe.precision.matmul import HasGroupedMatmuls

__all__ = ["Selection", "select"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Names of layers."""

    linears: tuple[str, ...]
    experts: tuple[str, ...]
    kept: Mapping[str, str]
    """Those that stay as they are, and why."""
    odd: Mapping[str, str] = field(default_factory=dict)
    """Of these, the sizes of those that no kernel takes."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.linears, *self.experts))

    def __str__(self) -> str:
        kinds = [(len(self.linears), "linear layer"), (len(self.experts), "stack of experts")]
        counts = [_counted(number, kind) for number, kind in kinds if number]
        stays = self._told(self.kept)
        return f"{' and '.join(counts)} ({_listed(self.names, self._layers)})" + (f"; not {stays}" if stays else "")

    @property
    def odd_sizes(self) -> str:
        return self._told(self.odd)

    @property
    def _layers(self) -> list[str]:
        return [*self.linears, *self.experts, *self.kept]

    def _told(self, names: Mapping[str, str]) -> str:
        """With what is said of each in brackets, once for all of whom it is said."""
        return ", ".join(f"{_listed(found, self._layers)} ({what})" for what, found in _by_value(names).items())


def select(
    module: nn.Module, *, multiple: int = 16, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Selection:
    """
    Args:
        multiple: sizes that kernels take.
        include: patterns of names, as ``fnmatch`` has them: these layers alone, sensitive ones too.
        exclude: patterns of names that stay as they are.

    Raises:
        ConfigurationError: a pattern fits no layer, a layer that was asked for cannot be converted, or none is left.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | HasGroupedMatmuls)}
    takes = [name for name, layer in layers.items() if isinstance(layer, HasGroupedMatmuls) or is_plain(layer)]
    problems = [
        f"{argument}={pattern!r} fits none of its {len(layers)} layers that multiply{_meant(pattern, layers)}"
        for argument, patterns in (("include", include), ("exclude", exclude))
        for pattern in patterns
        if not _fits(pattern, layers)
    ]
    sensitive = {} if include else _sensitive(module, [name for name in takes if isinstance(layers[name], nn.Linear)])
    converted: list[str] = []
    kept: dict[str, str] = {}
    odd: dict[str, str] = {}
    impossible: dict[str, str] = {}
    for name, layer in layers.items():
        odd_pairs = [(rows, columns) for rows, columns in _sizes(layer) if math.gcd(rows, columns) % multiple]
        sizes = " and ".join(f"{rows} x {columns}" for rows, columns in odd_pairs)
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            kept[name] = "excluded"
        elif include and not any(fnmatchcase(name, pattern) for pattern in include):
            kept[name] = "not included"
        elif name in sensitive:
            kept[name] = sensitive[name]
        elif name not in takes:
            kept[name] = f"{type(layer).__name__}, not a plain nn.Linear"
            impossible[name] = f"of another kind: {kept[name]}"
        elif sizes:
            kept[name], odd[name] = f"sizes that are no multiples of {multiple}", sizes
            rule = f"kernels take multiples of {multiple}; exclude it, or choose other sizes"
            impossible[name] = f"with a weight of {sizes}: {rule}"
        else:
            converted.append(name)
    if include:
        problems += [f"{_listed(names, layers)}: included, but {why}" for why, names in _by_value(impossible).items()]
    if not problems and not converted:
        reasons = "; ".join(f"{why}: {number}" for why, number in Counter(kept.values()).items())
        problems = [f"no layer is left to multiply in FP8 ({reasons or 'it has no linear layers'})"]
    if problems:
        raise ConfigurationError.of(f"{type(module).__name__} cannot be trained in FP8", problems)
    linears = tuple(name for name in converted if isinstance(layers[name], nn.Linear))
    return Selection(linears, tuple(name for name in converted if name not in linears), kept, odd)


def _sensitive(module: nn.Module, linears: Sequence[str]) -> dict[str, str]:
    named = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        if isinstance(part, KeepsHighPrecision)
        for name in part.in_high_precision
    }
    if named:
        return {
            name: "sensitive, as the model says"
            for name in linears
            if any(name == each or name.startswith(f"{each}.") for each in named)
        }
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    tied = [name for name in linears if id(module.get_submodule(name).weight) in embeddings]
    return dict.fromkeys([*linears[-1:], *tied], "taken for the output head")


def _sizes(layer: nn.Linear | HasGroupedMatmuls) -> Iterator[tuple[int, int]]:
    names = layer.grouped_matmuls if isinstance(layer, HasGroupedMatmuls) else ("weight",)
    for name in names:
        *_, rows, columns = getattr(layer, name).shape
        yield rows, columns


def _fits(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _meant(pattern: str, names: Iterable[str]) -> str:
    listed = list(names)
    close = get_close_matches(pattern, listed, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f": {_listed(listed, listed)}" if listed else ""


def _counted(number: int, kind: str) -> str:
    if number == 1:
        return f"1 {kind}"
    return f"{number} {kind.replace('stack', 'stacks') if kind.startswith('stack') else f'{kind}s'}"


def _by_value(names: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in names.items():
        found.setdefault(value, []).append(name)
    return found


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _listed(names: Iterable[str], layers: Iterable[str]) -> str:
    """``names`` of ``layers``, siblings together, and ``*`` for their numbers if all of a kind are meant: sixty blocks
    say no more than one.
    """
    chosen = set(names)
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(layers):
        kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    families: dict[str, list[str]] = {}
    for kind, members in kinds.items():
        meant = [name for name in members if name in chosen]
        for title in [kind] if len(meant) == len(members) else _numbered(kind, meant):
            parent, dot, child = title.rpartition(".")
            families.setdefault(parent + dot, []).append(child)
    return ", ".join(
        parent + (children[0] if len(children) == 1 else f"{{{','.join(children)}}}")
        for parent, children in families.items()
    )


def _numbered(kind: str, names: Sequence[str]) -> Sequence[str]:
    """``blocks.{0,2-4}.up`` for some of ``blocks.*.up``."""
    if kind.count("*") != 1 or not names:
        return names
    numbers = sorted(int(_NUMBER.findall(name)[0]) for name in names)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spans = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    alone = len(spans) == 1 and runs[0][0] == runs[0][1]
    return [kind.replace("*", spans[0] if alone else f"{{{','.join(spans)}}}")]
