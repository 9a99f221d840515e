"""Configurations: presets, overrides, and one error that says everything that is wrong."""

import typing
from dataclasses import asdict, fields, replace

import pytest

from lightning_dualpipe.deepseek_v3.config import ConfigOverrides, DeepSeekV3Config, YarnConfig
from lightning_dualpipe.errors import ConfigurationError


def test_overrides_are_exactly_the_fields():
    overrides, config = typing.get_type_hints(ConfigOverrides), typing.get_type_hints(DeepSeekV3Config)

    assert overrides == config
    assert list(overrides) == [field.name for field in fields(DeepSeekV3Config)]


@pytest.mark.parametrize("name", ["tiny", "small", "16b", "671b"])
def test_every_preset_is_valid_and_can_be_overridden(name):
    config = DeepSeekV3Config.from_preset(name, num_hidden_layers=5, mtp_loss_weight=0.1)

    assert (config.num_hidden_layers, config.mtp_loss_weight) == (5, 0.1)
    assert config == replace(DeepSeekV3Config.from_preset(name), num_hidden_layers=5, mtp_loss_weight=0.1)


def test_the_671b_preset_is_the_released_model():
    config = DeepSeekV3Config.from_preset("671b")

    assert (config.num_hidden_layers, config.first_k_dense_replace, config.hidden_size) == (61, 3, 7168)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group) == (256, 8, 8, 4)
    assert config.rope_scaling == YarnConfig(40.0, 4096, 32, 1, 1.0, 1.0)
    assert (config.initializer_range, config.bias_update_speed, config.aux_loss_alpha) == (0.006, 1e-3, 1e-4)


def test_rope_scaling_may_be_a_mapping():
    config = DeepSeekV3Config.from_preset("tiny", rope_scaling={"factor": 8.0, "mscale": 1.0})

    assert config.rope_scaling == YarnConfig(factor=8.0, mscale=1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hiden_layers": 3}, "num_hiden_layers=3: there is no such field; did you mean 'num_hidden_layers'?"),
        ({"qqq": 3}, "qqq=3: there is no such field; the fields are vocab_size, "),
        ({"rope_scaling": {"factr": 2}}, "factr=2: there is no such field; did you mean 'factor'?"),
        ({"rope_scaling": {"factor": 0.5}}, "factor=0.5 must be a number of at least 1"),
        ({"rope_scaling": {"beta_fast": 1, "beta_slow": 32}}, "beta_fast=1 must be at least beta_slow=32"),
        ({"rope_scaling": 40}, "rope_scaling=40 must be a YarnConfig"),
        ({"hidden_size": "128"}, "hidden_size='128' must be an integer of at least 1"),
        ({"hidden_size": True}, "hidden_size=True must be an integer"),
        ({"vocab_size": 0}, "vocab_size=0 must be an integer of at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be an integer of at least 1, or null"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a number greater than 0"),
        ({"aux_loss_alpha": float("nan")}, "aux_loss_alpha=nan must be a number of at least 0"),
        ({"rope_theta": 1}, "rope_theta=1 must be a number greater than 1"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 must be even"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace=9 dense layers do not fit into num_hidden_layers=4"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' must be 'sigmoid'"),
        ({"n_group": 3}, "n_group=3 must divide n_routed_experts=8; use one of 1, 2, 4"),
        ({"n_group": 8}, "n_group=8 leaves 1 expert per group"),
        ({"topk_group": 3}, "topk_group=3 groups cannot be chosen out of n_group=2; use at most 2"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds the 4 experts of topk_group=1"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_what_cannot_be_built_is_refused_with_value_rule_and_remedy(overrides, message):
    with pytest.raises(ConfigurationError) as error:
        DeepSeekV3Config.from_preset("tiny", **overrides)
    assert message in str(error.value)


def test_all_problems_come_in_one_error():
    with pytest.raises(ConfigurationError) as error:
        DeepSeekV3Config.from_preset("tiny", qk_rope_head_dim=63, n_group=3, scoring_func="softmax")
    assert str(error.value).count("\n  - ") == 3


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigurationError, match="preset='16B' is not one of tiny, small, 16b, 671b; did you mean"):
        DeepSeekV3Config.from_preset("16B")


def test_a_configuration_survives_its_own_fields():
    config = DeepSeekV3Config.from_preset("671b")

    assert DeepSeekV3Config(**{**asdict(config), "rope_scaling": config.rope_scaling}) == config
