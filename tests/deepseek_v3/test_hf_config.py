"""``config.json`` in both dialects, the traps of published files, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config, YarnConfig
from lightning_dualpipe.deepseek_v3.hf_config import config_from_hf, config_to_hf, generation_config
from lightning_dualpipe.errors import ConfigurationError
from tests.marks import needs

# What the published file of the 671B model says, in the order of its first dialect.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
WITHOUT_ROPE = {name: value for name, value in PUBLISHED.items() if not name.startswith("rope_")}


def test_the_published_file_is_the_671b_preset():
    preset = DeepSeekV3Config.from_preset("671b")
    assert config_from_hf(PUBLISHED) == dataclasses.replace(preset, initializer_range=0.02)


def test_integers_for_floats_become_floats():
    yarn = config_from_hf(PUBLISHED).rope_scaling
    assert yarn is not None and type(yarn.factor) is float and type(yarn.beta_fast) is float
    assert type(config_from_hf(PUBLISHED).rope_theta) is float


@pytest.mark.parametrize(
    ("rope", "theta", "yarn"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e4}, 5e4, None),
        ({"rope_theta": 5e4, "rope_scaling": None}, 5e4, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, 5e4, None),
        ({"rope_theta": 5e4, "rope_parameters": {"rope_type": "default"}}, 5e4, None),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 1e4, (4.0, 163840)),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 1e4, (4.0, 163840)),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 9.0}}, 9.0, (4.0, 163840)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_theta": 7.0}}, 1e4, (4.0, 163840)),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}}, 1e4, (40.0, 4096)),
        ({"rope_scaling": {"type": "yarn", "factor": 8}, "original_max_position_embeddings": 512}, 1e4, (8.0, 512)),
    ],
)
def test_rope_is_read_in_every_spelling(rope, theta, yarn):
    config = config_from_hf(WITHOUT_ROPE | rope)
    assert config.rope_theta == theta
    assert config.rope_scaling == (yarn and YarnConfig(factor=yarn[0], original_max_position_embeddings=yarn[1]))


def test_what_the_file_says_about_training_is_taken_and_what_it_leaves_out_is_the_reports():
    said = config_from_hf({**PUBLISHED, "aux_loss_alpha": 0.001, "seq_aux": True})
    assert (said.initializer_range, said.aux_loss_alpha) == (0.02, 0.001)
    left_out = config_from_hf({name: value for name, value in PUBLISHED.items() if name != "initializer_range"})
    assert (left_out.initializer_range, left_out.aux_loss_alpha) == (0.006, 0.0001)


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ({"n_group": None, "topk_group": None, "num_experts_per_tok": 8}, "n_group", 1),
        ({"n_shared_experts": None}, "n_shared_experts", 0),
        ({"num_nextn_predict_layers": None}, "num_nextn_predict_layers", 0),
        ({"q_lora_rank": None}, "q_lora_rank", None),
        ({"num_key_value_heads": None, "quantization_config": None}, "num_attention_heads", 128),
        ({"model_type": "kimi_k2"}, "n_routed_experts", 256),
    ],
)
def test_null_and_other_names_of_the_same_architecture_are_understood(setting, field, value):
    assert getattr(config_from_hf(PUBLISHED | setting), field) == value


def test_prediction_depth_is_read_under_either_name_and_is_0_when_not_declared():
    without = {name: value for name, value in PUBLISHED.items() if name != "num_nextn_predict_layers"}
    assert config_from_hf(without).num_nextn_predict_layers == 0
    assert config_from_hf(without | {"num_mtp_layers": 2}).num_nextn_predict_layers == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}, "'deepseek_v2'"),
        ({"model_type": None, "architectures": None}, "model_type=None"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"aux_loss_alpha": 0.001, "seq_aux": False}, "seq_aux=False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3'"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\]"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "factor='x'"),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings",
        ),
        ({"max_position_embeddings": "long"}, "max_position_embeddings='long'"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers='one'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size=None"),
        ({"quantization_config": "fp8"}, "'fp8'"),
        ({"hidden_size": "7168"}, "hidden_size='7168'"),
        ({"n_group": 7}, "n_group=7 must divide"),
        ({"norm_topk_prob": None}, "norm_topk_prob=None"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        config_from_hf(PUBLISHED | settings)


def test_all_that_is_wrong_is_said_at_once():
    wrong = {"scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 2, "model_type": "x"}
    settings = {k: v for k, v in (PUBLISHED | wrong).items() if k not in ("architectures", "vocab_size", "v_head_dim")}
    with pytest.raises(ConfigurationError) as caught:
        config_from_hf(settings)
    for name in (*wrong, "vocab_size is missing", "v_head_dim is missing"):
        assert name in str(caught.value)


CONFIGS = {
    "released": DeepSeekV3Config.from_preset("671b"),
    "tiny": DeepSeekV3Config.from_preset("tiny"),
    "16b": DeepSeekV3Config.from_preset("16b"),
    "every_field": DeepSeekV3Config.from_preset(
        "tiny",
        attention_bias=True,
        norm_topk_prob=False,
        rope_interleave=False,
        rope_theta=5e4,
        tie_word_embeddings=True,
        num_nextn_predict_layers=2,
        n_shared_experts=3,
        rms_norm_eps=1e-5,
        routed_scaling_factor=2.446,
        initializer_range=0.01,
        aux_loss_alpha=0.5,
        bias_update_speed=0.25,
        mtp_loss_weight=0.1,
        rope_scaling=YarnConfig(4.0, 100, 20.0, 2.0, 0.5, 0.7, 1.25, truncate=False),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_survives_the_way_there_and_back(config):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_exported_file_says_what_serving_engines_ask_for(config):
    settings = config_to_hf(config, dtype="float32", token_ids={"eos_token_id": 5})
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "rope_theta": config.rope_theta,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 5,
    }
    assert expected.items() <= settings.items()
    yarn = config.rope_scaling is not None
    assert (settings["rope_scaling"] is not None) == yarn
    assert settings["rope_parameters"]["rope_theta"] == config.rope_theta
    assert settings["rope_parameters"]["rope_type"] == ("yarn" if yarn else "default")
    if yarn:
        assert settings["rope_scaling"]["type"] == settings["rope_scaling"]["rope_type"] == "yarn"
        assert settings["rope_scaling"].items() - {"type": "yarn"}.items() <= settings["rope_parameters"].items()


def test_generation_begins_and_ends_with_the_given_tokens_only():
    assert generation_config({"eos_token_id": [1, 2], "bos_token_id": None}) == {
        "_from_model_config": True,
        "eos_token_id": [1, 2],
    }


@needs("transformers")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_reads_an_exported_configuration_and_writes_it_back_for_us(config, tmp_path: Path):
    from transformers import DeepseekV3Config

    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    theirs = DeepseekV3Config.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert config_from_hf(json.loads((tmp_path / "again" / "config.json").read_text())) == config


@needs("transformers")
def test_transformers_defaults_for_settings_a_file_may_leave_out_are_ours():
    from transformers import DeepseekV3Config

    optional = {
        *("n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps"),
        *("first_k_dense_replace", "attention_bias", "rope_interleave", "tie_word_embeddings"),
    }
    for name in optional:
        assert getattr(DeepseekV3Config(), name) == getattr(DeepSeekV3Config(), name), name
