"""Profile files, there and back, and what is wrong with others."""

import json

import pytest

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.planner import DEEPSEEK, Profile
from tests.planner.shapes import only, shape


def test_a_profile_survives_its_file(tmp_path):
    DEEPSEEK.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == DEEPSEEK
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["milliseconds"]["attention_forward"] == pytest.approx(4.36)


def test_slower_layers_make_slower_steps():
    times = DEEPSEEK.times * type(DEEPSEEK.times)(*[1.5] * 10)
    slower = Profile("test", "h800", "fp8", 4096, 64, True, times)
    assert only(profile=slower).compute == pytest.approx(1.5 * only(profile=DEEPSEEK).compute)
    assert only(profile=slower).step > 1.4 * only(profile=DEEPSEEK).step


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other/1"}, "its \"format\" is not 'lightning-dualpipe-profile/1'"),
        ({"gpu": "h900"}, "gpu='h900' is none of h800"),
        ({"tokens": "4096"}, "tokens='4096': an int is needed"),
        ({"tokens": 0}, "tokens=0: at least 1 is needed"),
        ({"precision": "fp4"}, "precision='fp4' is neither fp8 nor bf16"),
        ({"milliseconds": [1, 2]}, "milliseconds=[1, 2]: an object with attention_forward"),
        ({"milliseconds": {"attention_forward": 1, "atention": 2}}, "milliseconds has atention, which is none of"),
        ({"milliseconds": {"attention_forward": -1}}, "milliseconds.attention_forward=-1: a finite number, at least 0"),
        ({"milliseconds": {}}, "milliseconds lacks attention_forward, attention_input"),
    ],
)
def test_a_malformed_profile_is_explained(tmp_path, change, reason):
    path = tmp_path / "profile.json"
    DEEPSEEK.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigurationError) as caught:
        Profile.read(path)
    assert reason in str(caught.value)
    assert "docs/planner.md" in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_what_is_no_profile_at_all_is_explained(tmp_path, content):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"the profile .*profile.json cannot be"):
        Profile.read(path)


def test_a_profile_of_experts_needs_a_model_with_experts():
    dense = shape("16b", first_k_dense_replace=27, num_nextn_predict_layers=0)
    with pytest.raises(ConfigurationError, match="16b has none; plan without it"):
        DEEPSEEK.factors(dense)
