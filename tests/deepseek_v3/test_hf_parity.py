"""Numbers equal transformers' DeepSeek-V3, in both directions, option by option.

Each case is a ``config.json`` that differs from ``BASE`` in what its name says. Both models compute
in float64 (see ``tests/oracles/transformers_float64.py``): what is left is the order of sums, some
1e-13 of logits of size 1, so 1e-10 leaves no room for a difference in the formulas.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.convert import load_pretrained, read_pretrained_config, save_pretrained
from lightning_dualpipe.deepseek_v3.hf_config import config_from_hf
from lightning_dualpipe.deepseek_v3.hf_names import parts_of
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.router import Router
from tests.marks import needs

pytestmark = [
    needs("transformers"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),  # transformers without shared experts
]

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16}
BASE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 640,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}
CASES: dict[str, dict[str, Any]] = {
    "as_released": {},
    "queries_not_compressed": {"q_lora_rank": None},
    "one_group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "routed_scaling_factor": 2.446},
    "every_group": {"n_group": 4, "topk_group": 4},
    "uneven_groups": {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5},
    "no_yarn_other_theta_and_eps": {"rope_parameters": {"rope_theta": 50000.0}, "rms_norm_eps": 1e-3},
    "yarn_without_mscale": {"rope_parameters": YARN},
    "yarn_one_mscale": {"rope_parameters": {**YARN, "mscale": 0.8}},
    "yarn_all_dim_only": {"rope_parameters": {**YARN, "mscale_all_dim": 0.707}},
    "yarn_two_mscales": {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.707}},
    "yarn_attention_factor": {"rope_parameters": {**YARN, "attention_factor": 1.3, "mscale_all_dim": 1.0}},
    "yarn_ramp": {"rope_parameters": {**YARN, "factor": 4.5, "beta_fast": 2.5, "beta_slow": 0.3, "truncate": False}},
    "yarn_null_betas": {"rope_parameters": {**YARN, "beta_fast": None, "beta_slow": None}},
    "tied": {"tie_word_embeddings": True},
    "tied_without_mtp": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0},
    "two_shared_experts": {"n_shared_experts": 2},
    "no_shared_experts": {"n_shared_experts": 0},
    "no_dense_layer": {"first_k_dense_replace": 0, "num_nextn_predict_layers": 2},
    "only_dense_layers": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "dense_but_mtp": {"first_k_dense_replace": 3},
    "attention_bias": {"attention_bias": True},
    "attention_bias_uncompressed": {"attention_bias": True, "q_lora_rank": None},
    "topk_not_normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "halves_rotated": {"rope_interleave": False},
    "values_wider_than_keys": {"v_head_dim": 26},
    "values_narrower_than_keys": {"v_head_dim": 5},
    "one_head_odd_sizes": {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 33, "vocab_size": 101},
}
INPUT_IDS = torch.randint(0, 67, (2, 41), generator=torch.Generator().manual_seed(1))  # beyond the 16 of YaRN


@pytest.mark.parametrize("case", CASES)
def test_a_model_saved_by_transformers_computes_the_same_here(case, tmp_path):
    from tests.oracles.transformers_float64 import logits_and_experts, new_reference

    reference = new_reference(**BASE | CASES[case])
    reference.save_pretrained(tmp_path)
    model = Transformer(read_pretrained_config(tmp_path)).double().eval()
    load_pretrained(model, tmp_path)

    assert_same(ours(model), logits_and_experts(reference, INPUT_IDS))


@pytest.mark.parametrize("case", CASES)
def test_a_model_saved_here_computes_the_same_in_transformers(case, tmp_path):
    from tests.oracles.transformers_float64 import load_reference, logits_and_experts

    model = new_model(config_from_hf(BASE | CASES[case]))
    save_pretrained(model, tmp_path, dtype="float64")
    reference, info = load_reference(tmp_path)

    layers = range(model.config.num_hidden_layers, model.config.num_hidden_layers + len(model.mtp))
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith(tuple(f"model.layers.{layer}." for layer in layers)) for key in info["unexpected_keys"])
    assert_same(ours(model), logits_and_experts(reference, INPUT_IDS))


@pytest.mark.parametrize("yarn", [True, False])
def test_both_dialects_mean_the_same_here_and_in_transformers(yarn, tmp_path):
    from tests.oracles.transformers_float64 import load_reference, logits_and_experts

    rope = BASE["rope_parameters"] if yarn else {"rope_theta": 700.0}
    model = new_model(config_from_hf({**BASE, "rope_parameters": rope}))
    save_pretrained(model, tmp_path / "both", dtype="float64")
    drop = {"old": ("rope_parameters", "dtype"), "new": ("rope_scaling", "rope_theta", "torch_dtype")}
    for dialect, names in drop.items():
        shutil.copytree(tmp_path / "both", tmp_path / dialect)
        edit(tmp_path / dialect / "config.json", lambda settings, names=names: [settings.pop(name) for name in names])
    edit(tmp_path / "old" / "config.json", lambda settings: (settings["rope_scaling"] or {}).pop("rope_type", None))

    for dialect in ("both", *drop):
        assert read_pretrained_config(tmp_path / dialect) == model.config, dialect
        reference, _ = load_reference(tmp_path / dialect)
        assert_same(ours(model), logits_and_experts(reference, INPUT_IDS))


def new_model(config: DeepSeekV3Config) -> Transformer:
    """Random weights that float32 holds, norms and biases included."""
    model = Transformer(config).double().eval()
    generator = torch.Generator().manual_seed(2)
    for part in parts_of(model):
        width = part.tensor.shape[-1]
        mean, std = (1, 0.2) if part.name.endswith("norm.weight") else (0, 1.5 * width**-0.5)
        std = 0.3 if part.name.endswith("bias") else std
        part.tensor.data.copy_(torch.empty_like(part.tensor.data).normal_(mean, std, generator=generator).float())
    return model


def ours(model: Transformer) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, T, V] and per MoE layer the experts of each token [N, K] in ascending order."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: chosen.append(output[1].sort().values))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    with torch.no_grad():
        logits = model({"input_ids": INPUT_IDS})
    for hook in hooks:
        hook.remove()
    assert isinstance(logits, Tensor)
    return logits, chosen


def assert_same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    logits, experts = actual
    assert expected[0].std() > 0.3, "logits that hardly vary would prove nothing"
    torch.testing.assert_close(logits, expected[0], atol=1e-10, rtol=0)
    assert len(experts) == len(expected[1])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(experts, expected[1], strict=True))


def edit(path: Path, change: Any) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
