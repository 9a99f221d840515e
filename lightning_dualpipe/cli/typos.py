"""What a parser's error comes down to: the name that nobody knows, and the one that was meant.

jsonargparse tells of every type that was tried, at every level; the misspelt name is in the middle of
that. Here it is found again, so that it can be said once more in the last line. What is looked for are
the texts of jsonargparse 4; where they differ, or anything fails, there is no last line.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import get_type_hints

__all__ = ["what_was_meant"]

_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_TYPES = re.compile(r"<class '([\w.]+)'>")


def what_was_meant(message: str, options: Iterable[str] = ()) -> str | None:
    """A line for each misspelt name in the message; None where none is found.

    Args:
        options: those of the command line, without dashes.
    """
    try:
        lines = [_line(name, where, known) for name, where, known in _unknown_names(message, tuple(options))]
    except Exception:  # a hint that fails is no reason to hide the message itself
        return None
    return "\n".join(dict.fromkeys(lines)) or None


def _unknown_names(message: str, options: tuple[str, ...]) -> Iterator[tuple[str, str, list[str]]]:
    """A name, the place it was given in, and the names that are known there."""
    for found in re.finditer(r"unrecognized arguments: --([\w.+]+)", message):
        yield found[1], "the options", list(options)
    for found in re.finditer(r"does not accept option '([\w.]+)'", message):
        yield _known_start(found[1], options), "the options", list(options)
    for found in re.finditer(r"Option '([\w.]+)' is not accepted", message):
        path = _last(_CLASS, message[: found.start()])
        yield _argument(found[1], path)
    for found in re.finditer(r"Unexpected keys: \{(.+?)\}", message):
        before = message[: found.start()]
        key = _last(re.compile(r'Parser key "([\w.]+)"'), before)
        fields = [name for path in _TYPES.findall(before.rpartition("Subtypes:")[2]) for name in _fields(path)]
        for name in re.findall(r"'(\w+)'", found[1]):
            yield name, f"the keys of {key}", fields
    for found in re.finditer(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module = import_module(found[1])
        yield found[2], f"the names in {found[1]}", list(getattr(module, "__all__", dir(module)))


def _line(name: str, where: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    if near:
        return f"{name!r} is none of {where}; did you mean {near[0]!r}?"
    few = len(known) <= 60
    return f"{name!r} is none of {where}" + (f", which are {', '.join(known)}" if known and few else "")


def _known_start(option: str, options: Iterable[str]) -> str:
    """Of ``modle.class_path`` the part that is wrong: in a file, levels below it follow."""
    starts = {".".join(each.split(".")[:depth]) for each in options for depth in range(1, each.count(".") + 2)}
    parts = option.split(".")
    return next((start for n in range(1, len(parts)) if (start := ".".join(parts[:n])) not in starts), option)


def _argument(name: str, path: str) -> tuple[str, str, list[str]]:
    first, dot, _ = name.partition(".")
    arguments = _arguments(path)
    if dot and first not in arguments:  # beside class_path
        return first, f"the keys beside class_path: {path}", ["init_args", "dict_kwargs"]
    return name, f"the arguments of {path}", arguments


def _arguments(path: str) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, each in inspect.signature(_imported(path)).parameters.items() if each.kind not in kinds]


def _fields(path: str) -> list[str]:
    """Of a typed dictionary; other types have no keys."""
    kind = _imported(path) if "." in path else None
    return list(get_type_hints(kind)) if hasattr(kind, "__total__") else []


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def _last(pattern: re.Pattern[str], text: str) -> str:
    return pattern.findall(text)[-1]
