"""What we call of Transformer Engine, as its source has it: parsed, never imported, so no GPU is needed.

    python -m tests.precision.te_signatures PATH [--version 2.20.2]

``PATH`` holds the package ``transformer_engine`` (a ``site-packages``, or a checkout of its repository). Adds what
is found to ``tests/golden/te_signatures.json``, by version.
"""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "golden" / "te_signatures.json"

# By file (the first that has it: 2.9 renamed one), what of it is called or read.
CALLED = {
    ("pytorch/module/linear.py",): ["Linear.__init__", "Linear.forward"],
    ("pytorch/module/grouped_linear.py",): [
        "GroupedLinear.__init__",
        "GroupedLinear.forward",
        "GroupedLinear.backward_dw",
    ],
    ("pytorch/module/base.py",): ["TransformerEngineBaseModule.backward_dw"],
    ("pytorch/module/_common.py",): [
        "WeightGradStore.__init__",
        "WeightGradStore.delay_wgrad_compute",
        "WeightGradStore.enable_delay_wgrad_compute",
        "WeightGradStore.disable_delay_wgrad_compute",
    ],
    ("pytorch/quantization.py", "pytorch/fp8.py"): [
        "autocast",
        "fp8_autocast",
        "is_fp8_available",
        "is_mxfp8_available",
        "is_fp8_block_scaling_available",
        "FP8GlobalStateManager.is_fp8_available",
        "FP8GlobalStateManager.is_mxfp8_available",
        "FP8GlobalStateManager.is_fp8_block_scaling_available",
    ],
    ("common/recipe/__init__.py",): [
        "QParams",
        "Format",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "DelayedScaling",
        "MXFP8BlockScaling",
    ],
    ("pytorch/tensor/float8_blockwise_tensor.py",): ["Float8BlockQuantizer.__init__"],
}
ATTRIBUTES = {
    "pytorch/module/base.py": {"TransformerEngineBaseModule": ["_fp8_workspaces"]},
    "pytorch/module/_common.py": {"WeightGradStore": ["context"]},
    "pytorch/module/linear.py": {"Linear": ["wgrad_store"]},
    "pytorch/module/grouped_linear.py": {"GroupedLinear": ["wgrad_store"]},
}


def signatures(root: Path) -> dict[str, list[str]]:
    """By dotted name: parameters of functions, fields of dataclasses, members of enums, attributes set in ``self``."""
    package = root / "transformer_engine"
    found: dict[str, list[str]] = {}
    for files, names in CALLED.items():
        text = next(((package / file).read_text() for file in files if (package / file).is_file()), "")
        tree = ast.parse(text)
        for name in names:
            parameters = _of(tree, name)
            if parameters is not None:
                found[name] = parameters
    for file, classes in ATTRIBUTES.items():
        tree = ast.parse((package / file).read_text())
        for name, wanted in classes.items():
            assigned = set(_assigned_to_self(_definition(tree, name)))
            found[f"{name}.self"] = [attribute for attribute in wanted if attribute in assigned]
    return found


def _of(tree: ast.Module, dotted: str) -> list[str] | None:
    node: ast.AST | None = tree
    for name in dotted.split("."):
        node = _definition(node, name) if node is not None else None
    if isinstance(node, ast.ClassDef) and dotted == "autocast":  # a function, up to 2.14 at least
        node = _definition(node, "__init__")
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return [each.arg for each in every if each.arg not in ("self", "cls")]
    return list(_fields(node)) if isinstance(node, ast.ClassDef) else None


def _definition(tree: ast.AST | None, name: str) -> ast.AST | None:
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        for target in [line.target] if isinstance(line, ast.AnnAssign) else getattr(line, "targets", []):
            if isinstance(target, ast.Name):
                yield target.id


def _assigned_to_self(node: ast.AST | None) -> Iterator[str]:
    for line in ast.walk(node) if node is not None else ():
        for target in [line.target] if isinstance(line, ast.AnnAssign) else getattr(line, "targets", []):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                yield target.attr


def version_of(root: Path) -> str:
    """Of a site-packages, by what pip left there; of a checkout, by its file."""
    for metadata in root.glob("transformer_engine-*.dist-info"):
        return metadata.name.removeprefix("transformer_engine-").removesuffix(".dist-info")
    return (root / "build_tools" / "VERSION.txt").read_text().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--version")
    arguments = parser.parse_args()
    known = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    known[arguments.version or version_of(arguments.path)] = signatures(arguments.path)
    ordered = sorted(known.items(), key=lambda each: [int(part) for part in each[0].split(".")])
    GOLDEN.write_text(json.dumps(dict(ordered), indent=1) + "\n")


if __name__ == "__main__":
    main()
