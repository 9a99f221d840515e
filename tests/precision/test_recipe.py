import pytest

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.recipe import BF16, MXFP8, Block, Current, Delayed, Operand, recipe_of

NAMES = {"block": Block(), "current": Current(), "delayed": Delayed(), "mxfp8": MXFP8(), "bf16": BF16()}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_a_mapping_and_the_recipe_itself_are_the_same(name):
    assert recipe_of(name) == recipe_of({"name": name}) == recipe_of(NAMES[name]) == NAMES[name]
    assert NAMES[name].name == name


def test_settings_arrive():
    assert recipe_of({"name": "block", "scales": "float32"}) == Block(scales="float32")
    assert recipe_of({"name": "current", "gradient_format": "e4m3"}) == Current(gradient_format="e4m3")
    assert recipe_of({"name": "delayed", "history": 16}) == Delayed(history=16)


def test_operands_are_those_of_the_formats():
    """Report, section 3.3.2; OCP MX v1.0; hybrid per-tensor scaling."""
    block = Block()
    assert block.activation == block.gradient == Operand("e4m3", (1, 128), "power_of_two")
    assert block.weight == Operand("e4m3", (128, 128), "power_of_two")
    assert Block("float32").activation.scales == Block("float32").weight.scales == "float32"
    for hybrid in (Current(), Delayed()):
        assert hybrid.activation == hybrid.weight == Operand("e4m3", None, "float32")
        assert hybrid.gradient == Operand("e5m2", None, "float32")
    mx = MXFP8()
    assert mx.activation == mx.weight == mx.gradient == Operand("e4m3", (1, 32), "power_of_two")
    assert BF16().activation is BF16().weight is BF16().gradient is None


REFUSED = {
    "an unknown name": (
        "blok",
        "recipe 'blok' is not one of block, current, delayed, mxfp8, bf16; did you mean 'block'?",
    ),
    "no name": ({"scales": "float32"}, "recipe {'scales': 'float32'} has no name; write {'name': 'block', …}"),
    "no word": (3, "recipe 3 is not one of block, current, delayed, mxfp8, bf16"),
    "a list": (["block"], "recipe ['block'] is not one of block, current, delayed, mxfp8, bf16"),
    "a value that its class does not check": (
        Block("fp32"),
        "scales='fp32' of recipe 'block' must be one of 'power_of_two', 'float32'",
    ),
    "an unknown key": (
        {"name": "block", "scale": "float32"},
        "recipe 'block' has no setting 'scale': its settings are scales; did you mean 'scales'?",
    ),
    "a key of another recipe": (
        {"name": "block", "history": 3},
        "recipe 'block' has no setting 'history': its settings are scales",
    ),
    "a key where there are none": ({"name": "mxfp8", "scales": "float32"}, "recipe 'mxfp8' has no setting 'scales'"),
    "an unknown value": (
        {"name": "block", "scales": "fp32"},
        "scales='fp32' of recipe 'block' must be one of 'power_of_two', 'float32'",
    ),
    "no number": (
        {"name": "delayed", "history": "long"},
        "history='long' of recipe 'delayed' must be a positive integer",
    ),
    "a truth value": (
        {"name": "delayed", "history": True},
        "history=True of recipe 'delayed' must be a positive integer",
    ),
    "not positive": ({"name": "delayed", "history": 0}, "history=0 of recipe 'delayed' must be a positive integer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_recipe_is_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as refused:
        recipe_of(given)
    assert message in str(refused.value)
