"""Every call of Transformer Engine has the arguments that its source has, in the oldest version and in the newest."""

import ast
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_dualpipe.precision import te_backend
from tests.precision.fake_te import FAKE
from tests.precision.te_signatures import GOLDEN, signatures, version_of

KNOWN = json.loads(GOLDEN.read_text())
NEWEST = "2.20.2"
SOURCE = Path(te_backend.__file__).read_text()
CALLED_AS = {"Linear": "Linear.__init__", "GroupedLinear": "GroupedLinear.__init__"}


def names_called():
    """Calls of names that a version knows, with the names of their arguments."""
    known = {name for version in KNOWN.values() for name in version}
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = CALLED_AS.get(node.func.attr, node.func.attr)
            if name in known:
                yield name, node


@pytest.mark.parametrize("version", KNOWN)
def test_arguments_are_known(version):
    seen = set()
    for name, call in names_called():
        parameters = KNOWN[version].get(name)
        if parameters is None:
            assert (name, version) == ("autocast", "2.8.0"), f"{version} has no {name}"
            continue  # asked for first
        given = [keyword.arg for keyword in call.keywords]
        assert set(given) <= set(parameters), f"{name} of {version} has no {sorted(set(given) - set(parameters))}"
        assert not set(given) & set(parameters[: len(call.args)]), f"{name} is given an argument twice"
        seen.add(name)
    expected = {"Linear.__init__", "GroupedLinear.__init__", "fp8_autocast", "QParams", "DelayedScaling"}
    assert seen >= expected | {"Float8BlockScaling", "Float8CurrentScaling", "MXFP8BlockScaling"}, seen


@pytest.mark.parametrize("version", KNOWN)
def test_what_is_called_of_modules_and_set_in_recipes_is_there(version):
    known = KNOWN[version]
    # positionally: in, out; experts, in, out; rows; rows and their counts
    assert known["Linear.__init__"][:2] == ["in_features", "out_features"]
    assert known["GroupedLinear.__init__"][:3] == ["num_gemms", "in_features", "out_features"]
    assert known["Linear.forward"][:2] == ["inp", "is_first_microbatch"]
    assert known["GroupedLinear.forward"][:3] == ["inp", "m_splits", "is_first_microbatch"]
    assert known["TransformerEngineBaseModule.backward_dw"] == known["GroupedLinear.backward_dw"] == []
    for method in ("delay_wgrad_compute", "enable_delay_wgrad_compute", "disable_delay_wgrad_compute"):
        assert known[f"WeightGradStore.{method}"] == []
    assert known["WeightGradStore.self"] == ["context"] and known["Linear.self"] == ["wgrad_store"]
    assert known["TransformerEngineBaseModule.self"] == ["_fp8_workspaces"]
    for recipe in ("Float8BlockScaling", "Float8CurrentScaling"):
        assert {"fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"} <= set(known[recipe])
    assert {"E4M3", "HYBRID"} <= set(known["Format"])


def test_availability_is_asked_where_each_version_has_it():
    for needs in te_backend._NEEDS.values():
        assert KNOWN[NEWEST][needs.question] == ["return_reason"]
        assert needs.question not in KNOWN["2.8.0"]
        assert KNOWN["2.8.0"][f"FP8GlobalStateManager.{needs.question}"] == []


def test_the_fake_has_the_signatures_of_the_newest():
    fake = signatures(FAKE)
    assert len(fake) > 20
    assert {name: KNOWN[NEWEST][name] for name in fake} == fake


@pytest.mark.skipif(
    not os.environ.get("TRANSFORMER_ENGINE") and find_spec("transformer_engine") is None,
    reason="needs the files of Transformer Engine, installed or in the folder that TRANSFORMER_ENGINE names",
)
def test_the_recorded_signatures_are_those_of_the_installed_package():
    spec = find_spec("transformer_engine")
    root = Path(os.environ.get("TRANSFORMER_ENGINE") or Path(spec.origin).parent.parent)
    version = version_of(root)
    if version not in KNOWN:
        pytest.skip(f"{version} is not recorded: python -m tests.precision.te_signatures {root}")
    assert signatures(root) == KNOWN[version]
