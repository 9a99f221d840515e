"""Weights go to Hugging Face directories and come back bit by bit, whole or in parts, or one error says why not."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.convert import (
    load_pretrained,
    read_pretrained_config,
    read_token_ids,
    save_pretrained,
)
from lightning_dualpipe.deepseek_v3.hf_fp8 import dequantise
from lightning_dualpipe.deepseek_v3.hf_names import Part, copies, parts_of, shapes_by_key
from lightning_dualpipe.deepseek_v3.hf_reader import load_weights
from lightning_dualpipe.deepseek_v3.hf_writer import save_weights
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import as_layers
from lightning_dualpipe.pipeline.partition import keep_only, materialize
from tests.marks import needs

pytestmark = needs("safetensors")

CONFIG = DeepSeekV3Config(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    moe_intermediate_size=6,
    num_hidden_layers=3,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=10,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    max_position_embeddings=64,
)
CONFIGS = {
    "one_depth": CONFIG,
    "no_depth": replace(CONFIG, num_nextn_predict_layers=0),
    "two_depths_tied": replace(CONFIG, num_nextn_predict_layers=2, tie_word_embeddings=True),
    "bias_no_compression": replace(CONFIG, attention_bias=True, q_lora_rank=None),
    "no_shared_experts": replace(CONFIG, n_shared_experts=0),
    "all_dense": replace(CONFIG, first_k_dense_replace=3, num_nextn_predict_layers=0),
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("max_shard_size", ["5GB", 1000])
def test_weights_come_back_bit_by_bit_from_one_file_and_from_many(config, max_shard_size, tmp_path):
    model = new_model(config)
    save_pretrained(model, tmp_path, dtype="float32", max_shard_size=max_shard_size)

    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    if max_shard_size == 1000:
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 10
        assert json.loads(index.read_text())["metadata"]["total_size"] == total_size(tmp_path)
    else:
        assert shards == ["model.safetensors"] and not index.exists()
    assert_equal(reloaded(tmp_path), model)


def test_every_key_is_the_one_that_deepseek_publishes(tmp_path):
    save_pretrained(new_model(CONFIG), tmp_path)
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    block = [f"self_attn.{name}.weight" for name in attention]
    block += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    ffn = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    experts = [f"mlp.experts.{e}.{name}" for e in range(4) for name in ffn] + [f"mlp.shared_experts.{n}" for n in ffn]
    moe = [*block, *experts, "mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
    mtp = ["enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head"]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.0.{name}" for name in [*block, *(f"mlp.{name}" for name in ffn)]}
    expected |= {f"model.layers.{layer}.{name}" for layer in (1, 2, 3) for name in moe}
    expected |= {f"model.layers.3.{name}.weight" for name in mtp}

    tensors = stored(tmp_path)
    assert tensors.keys() == expected
    assert tensors["model.layers.2.mlp.experts.3.gate_proj.weight"].shape == (6, 24)
    assert tensors["model.layers.2.mlp.experts.3.down_proj.weight"].shape == (24, 6)


def test_the_released_model_has_as_many_tensors_and_numbers_as_its_files():
    """46,183 keys of weights, two of them copies; 671,026,419,200 numbers and 11,610,068,224 of prediction."""
    config = DeepSeekV3Config.from_preset("671b")
    shapes = shapes_by_key(config)
    assert len(shapes) + len([*copies("embed_tokens.weight", config), *copies("lm_head.weight", config)]) == 46_183
    assert sum(math.prod(shape) for shape in shapes.values()) == 671_026_419_200 + 11_610_068_224


def test_gate_rows_come_before_up_rows_and_copies_equal_what_they_copy(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    tensors = stored(tmp_path)
    gate_up = dict(model.named_parameters())["blocks.1.mlp.experts.gate_up_proj"][2].detach()
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.gate_proj.weight"], gate_up[:6])
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.up_proj.weight"], gate_up[6:])
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_router_bias_is_float32_in_files_of_every_precision(dtype, tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype=dtype)
    tensors = stored(tmp_path)
    bias = dict(model.named_buffers())["blocks.1.mlp.gate.e_score_correction_bias"]
    assert {str(tensor.dtype) for key, tensor in tensors.items() if not key.endswith("bias")} == {f"torch.{dtype}"}
    assert torch.equal(tensors[BIAS], bias) and not torch.equal(bias, bias.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_converted_to_the_models_precision_and_the_bias_is_not(dtype, tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    other = Transformer(CONFIG, seed=9).to(dtype)
    load_pretrained(other, tmp_path)
    expected = {part.name: part.tensor for part in parts_of(model)}
    for part in parts_of(other):
        wanted = torch.float32 if part.name.endswith("bias") else dtype
        assert part.tensor.dtype == wanted
        assert torch.equal(part.tensor, expected[part.name].to(wanted)), part.name


def test_one_rank_reads_its_own_layers_and_experts(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32", max_shard_size=3000)
    expected = {part.name: part.tensor for part in parts_of(model)}
    rank = Transformer(CONFIG, seed=9)
    rank.blocks[2].mlp.experts.keep_experts(1, 2)
    parts = [part for part in parts_of(rank) if part.name.startswith(("blocks.2.", "norm."))]
    others = {part.name: part.tensor.clone() for part in parts_of(rank) if part.name.startswith("blocks.1.")}

    load_weights(parts, tmp_path, CONFIG)
    for part in parts:
        wanted = expected[part.name]
        assert torch.equal(part.tensor, wanted[1:3] if ".experts." in part.name else wanted), part.name
    assert all(torch.equal(part.tensor, others[part.name]) for part in parts_of(rank) if part.name in others)


def test_a_model_cut_for_a_pipeline_reads_what_is_left_of_it(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32", max_shard_size=3000)
    with torch.device("meta"):
        stage = Transformer(CONFIG)
    layers = as_layers(stage.layers())
    keep_only(stage, layers[3:], layers)
    materialize(stage, torch.device("cpu"))
    load_pretrained(stage, tmp_path)

    expected = {part.name: part.tensor for part in parts_of(model)}
    held = {part.name: part.tensor for part in parts_of(stage)}
    assert {name.split(".")[0] for name in held} == {"embed_tokens", "blocks", "norm", "mtp", "lm_head"}
    assert not any(name.startswith(("blocks.0.", "blocks.1.")) for name in held)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())


def test_parts_may_come_in_any_order_and_experts_a_few_at_a_time(tmp_path):
    model = new_model(CONFIG)
    halves: list[Part] = []
    for part in parts_of(model):
        halves += [Part(part.name, part.tensor[2:], 2)] if ".experts." in part.name else []
        halves += [Part(part.name, part.tensor[:2] if ".experts." in part.name else part.tensor)]
    save_weights(reversed(halves), CONFIG, tmp_path, dtype="float32")
    assert_equal(reloaded(tmp_path), model)


def test_writing_holds_at_most_one_shard_in_memory(tmp_path):
    """What was handed over is on disk, a shard's worth apart."""
    handed_over, waiting = 0, []

    def parts() -> Iterator[Part]:
        nonlocal handed_over
        for part in parts_of(new_model(replace(CONFIG, num_nextn_predict_layers=0))):
            yield part
            handed_over += part.tensor.numel() * 4
            waiting.append(handed_over - total_size(tmp_path / ".incomplete"))

    config = replace(CONFIG, num_nextn_predict_layers=0)
    save_weights(parts(), config, tmp_path, dtype="float32", max_shard_size=5000)
    assert handed_over > 40000 and 2000 < max(waiting) <= 5000


def test_multi_token_prediction_declared_but_absent_is_none(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    rewrite(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".layers.3." in key])
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    config = read_pretrained_config(tmp_path)
    assert config == replace(CONFIG, num_nextn_predict_layers=0)
    loaded = Transformer(config, seed=9)
    load_pretrained(loaded, tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ConfigurationError, match="num_nextn_predict_layers=0"):
        load_pretrained(Transformer(CONFIG), tmp_path)


def test_multi_token_prediction_may_be_left_in_the_files(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    without = Transformer(replace(CONFIG, num_nextn_predict_layers=0), seed=9)
    load_pretrained(without, tmp_path)
    expected = {part.name: part.tensor for part in parts_of(model)}
    assert all(torch.equal(part.tensor, expected[part.name]) for part in parts_of(without))


def test_multi_token_prediction_that_is_not_declared_is_found(tmp_path):
    save_pretrained(new_model(CONFIG), tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=None)
    assert read_pretrained_config(tmp_path) == CONFIG


def test_keys_that_old_writers_add_do_no_harm(tmp_path):
    config = replace(CONFIG, tie_word_embeddings=True)
    model = new_model(config)
    save_pretrained(model, tmp_path, dtype="float32")
    rewrite(
        tmp_path,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
            }
        ),
    )
    assert_equal(reloaded(tmp_path), model)


@pytest.mark.parametrize("scales_elsewhere", [False, True])
def test_fp8_blocks_are_dequantised_ragged_edges_included(scales_elsewhere, tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    block, expected, scales = (5, 7), {}, {}

    def quantise(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "proj" in key and "eh_proj" not in key]:
            rows, columns = tensors[key].shape
            scale = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
            expected[key] = torch.tensor(
                [
                    [float(tensors[key][r, c]) * float(scale[r // block[0], c // block[1]]) for c in range(columns)]
                    for r in range(rows)
                ]
            )
            (scales if scales_elsewhere else tensors)[f"{key}_scale_inv"] = scale

    rewrite(tmp_path, quantise)
    if scales_elsewhere:
        split_off(tmp_path, scales)
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block})
    loaded = reloaded(tmp_path)
    save_pretrained(loaded, tmp_path / "again", dtype="float32")
    again = stored(tmp_path / "again")
    assert expected and all(torch.equal(again[key], value) for key, value in expected.items())


def test_a_matrix_of_four_and_a_half_blocks_is_dequantised():
    """kv_a_proj_with_mqa of the released weights: 576 rows in 5 blocks."""
    values, scales = torch.randn(576, 300).to(torch.float8_e4m3fn), torch.rand(5, 3)
    expected = values.float() * scales.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(dequantise(values, scales, (128, 128)), expected)


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: tensor})


O_PROJ = "model.layers.0.self_attn.o_proj.weight"
EMBEDDING = torch.zeros(37, 24)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(O_PROJ), f"1 tensor missing from the files: {O_PROJ}"),
        (lambda tensors: tensors.clear(), r"97 tensors missing from the files: .*, and 93 more"),
        (
            put("model.layers.0.self_attn.z.weight", torch.ones(1)),
            "not in the model: model.layers.0.self_attn.z.weight",
        ),
        (put("model.layers.7.input_layernorm.weight", torch.ones(24)), "not in the model: model.layers.7"),
        (put("model.layers.1.mlp.experts.4.gate_proj.weight", torch.ones(6, 24)), "experts.4.gate_proj"),
        (put(O_PROJ, torch.ones(24, 11)), r"o_proj.weight is \[24, 11\] in the files and \[24, 12\] in the model"),
        (put(O_PROJ, torch.ones(24, 12, dtype=torch.int8)), "o_proj.weight is I8"),
        (put(O_PROJ, torch.ones(24, 12).to(torch.float8_e5m2)), "o_proj.weight is F8_E5M2"),
        (put(O_PROJ, torch.ones(24, 12).to(torch.float8_e4m3fn)), "F8_E4M3 without .*_scale_inv"),
        (
            lambda tensors: tensors.update(
                {O_PROJ: torch.ones(24, 12).to(torch.float8_e4m3fn), f"{O_PROJ}_scale_inv": torch.ones(2, 1)}
            ),
            r"_scale_inv is \[2, 1\], blocks of \[128, 128\] need \[1, 1\]",
        ),
        (put("model.layers.3.mlp.z", torch.ones(1)), "not in the model: model.layers.3.mlp.z"),
        (put("model.layers.3.embed_tokens.weight", EMBEDDING), "layers.3.embed_tokens.weight differs from"),
        (put("model.layers.3.shared_head.head.weight", EMBEDDING), "shared_head.head.weight differs from lm_head"),
    ],
)
def test_weights_that_do_not_fit_are_one_error_and_leave_the_model_alone(change, words, tmp_path):
    save_pretrained(new_model(CONFIG), tmp_path, dtype="float32")
    rewrite(tmp_path, change)
    model = Transformer(CONFIG, seed=9)
    with pytest.raises(ConfigurationError, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_weights(parts_of(model), tmp_path, CONFIG)
    assert_equal(model, Transformer(CONFIG, seed=9))


def test_several_problems_are_told_together(tmp_path):
    save_pretrained(new_model(CONFIG), tmp_path, dtype="float32")
    rewrite(tmp_path, put("model.x", torch.ones(1)))
    rewrite(tmp_path, put(O_PROJ, torch.ones(1, 1)))
    rewrite(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ConfigurationError, match=r"(?s)model.norm.weight.*model.x.*o_proj.weight is \[1, 1\]"):
        load_pretrained(Transformer(CONFIG), tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: truncate(path / "model-00002-of-00003.safetensors"), "model-00002.*truncated or damaged"),
        (lambda path: (path / "model-00001-of-00003.safetensors").write_bytes(b"not one"), "truncated or damaged"),
        (lambda path: (path / "model-00001-of-00003.safetensors").write_bytes(b""), "truncated or damaged"),
        (
            lambda path: (path / "model-00001-of-00003.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1"
            ),
            "git lfs pull",
        ),
        (lambda path: (path / "model-00002-of-00003.safetensors").unlink(), "model-00002.* absent"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{"), "not readable JSON"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda path: (path / "model.safetensors.index.json").write_text("[]"), "a JSON list"),
        (lambda path: (path / "model.safetensors.index.json").unlink(), "no weights"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "both model.safetensors and"),
        (lambda path: (path / "config.json").unlink(), "config.json does not exist"),
        (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), "config.json is not readable JSON"),
    ],
)
def test_damaged_directories_are_one_clear_error(damage, words, tmp_path):
    save_pretrained(new_model(CONFIG), tmp_path, dtype="float32", max_shard_size=34000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    damage(tmp_path)
    model = Transformer(CONFIG, seed=9)
    with pytest.raises(ConfigurationError, match=words):
        load_pretrained(model, tmp_path)
    assert_equal(model, Transformer(CONFIG, seed=9))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("../model.safetensors", "must lie in the directory itself"),
        ("model-00001-of-00003.safetensors", "does not hold"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(file, words, tmp_path):
    folder = tmp_path / "model"
    save_pretrained(new_model(CONFIG), folder, dtype="float32", max_shard_size=34000)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=words):
        load_pretrained(Transformer(CONFIG), folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "names on a hub are not looked up"),
        (lambda path: path.write_text(""), "is a file: give the directory"),
        (lambda path: path.mkdir(), "the directory holds nothing"),
        (lambda path: (path / "x").mkdir(parents=True), "the directory holds x"),
        (lambda path: (path / ".incomplete").mkdir(parents=True), "was interrupted: export again"),
    ],
)
def test_a_directory_without_a_model_says_what_it_is(make, words, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(ConfigurationError, match=words):
        read_pretrained_config(tmp_path / "model")


def test_other_settings_than_the_files_are_warned_about_and_allowed(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    other = Transformer(replace(CONFIG, rope_theta=5e5, aux_loss_alpha=0.0), seed=9)
    with pytest.warns(UserWarning, match=r"rope_theta=500000.0 \(its config.json: 10000.0\)$"):
        load_pretrained(other, tmp_path)
    assert_equal(other, model)


def test_an_existing_model_is_replaced_only_when_asked(tmp_path):
    first, second = new_model(CONFIG), new_model(replace(CONFIG, num_nextn_predict_layers=0))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(first, tmp_path, max_shard_size=2000)
    with pytest.raises(ConfigurationError, match="overwrite=True"):
        save_pretrained(second, tmp_path)
    assert read_pretrained_config(tmp_path) == CONFIG

    save_pretrained(second, tmp_path, dtype="float32", overwrite=True)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert_equal(reloaded(tmp_path), second)


def test_an_interrupted_export_leaves_the_old_model_or_none(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path / "old", dtype="float32", max_shard_size=2000)

    def interrupted() -> Iterator[Part]:
        yield from list(parts_of(model))[:30]
        raise KeyboardInterrupt

    for folder in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            save_weights(interrupted(), CONFIG, tmp_path / folder, max_shard_size=2000, overwrite=True)
    assert_equal(reloaded(tmp_path / "old"), model)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("files_in_place", range(6))  # of 3 shards, index, generation_config.json, config.json
def test_an_export_that_fails_while_it_replaces_a_model_leaves_none_rather_than_a_mixture(
    files_in_place, tmp_path, monkeypatch
):
    model, replace_file, left = new_model(CONFIG), os.replace, iter(range(files_in_place))

    def replace_some(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise OSError("the disk is full")
        replace_file(source, target)

    save_pretrained(model, tmp_path, max_shard_size=17000)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace_some)
        with pytest.raises(ConfigurationError, match="cannot be written: the disk is full"):
            save_pretrained(model, tmp_path, dtype="float32", max_shard_size=34000, overwrite=True)
    with pytest.raises(ConfigurationError, match=r"config\.json does not exist"):
        reloaded(tmp_path)


def test_a_killed_export_is_no_model_and_no_obstacle(tmp_path):
    (tmp_path / ".incomplete").mkdir()
    (tmp_path / ".incomplete" / "0.safetensors").write_bytes(b"half a shard")
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    assert_equal(reloaded(tmp_path), model)
    assert not (tmp_path / ".incomplete").exists()


def test_a_part_of_a_model_cannot_be_exported(tmp_path):
    model = new_model(CONFIG)
    with pytest.raises(ConfigurationError, match="gather the model first"):
        save_weights(list(parts_of(model))[1:], CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_named_before_anything_is_written(tmp_path):
    model = new_model(CONFIG)
    for arguments, words in [
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"max_shard_size": "5 parsecs"}, "max_shard_size='5 parsecs'"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            save_pretrained(model, tmp_path, **arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        save_pretrained(model, tmp_path / "file")


def test_token_ids_go_from_one_directory_to_the_next(tmp_path):
    token_ids = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": None}
    save_pretrained(new_model(CONFIG), tmp_path, token_ids=token_ids)
    assert read_token_ids(tmp_path) == token_ids
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": [1, 2]}


def new_model(config: DeepSeekV3Config) -> Transformer:
    """No two numbers of any tensor are likely equal, the bias and the norms included."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    for part in parts_of(model):
        part.tensor.data.normal_(generator=generator)
    return model


def reloaded(directory: Path) -> Transformer:
    model = Transformer(read_pretrained_config(directory), seed=9)
    load_pretrained(model, directory)
    return model


def assert_equal(actual: Transformer, expected: Transformer) -> None:
    wanted, found = ({part.name: part.tensor for part in parts_of(model)} for model in (expected, actual))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def stored(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


def total_size(directory: Path) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in stored(directory).values())


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Another ``model.safetensors``."""
    from safetensors.torch import save_file

    tensors = stored(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def split_off(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Two shards: what was there, and ``tensors``."""
    from safetensors.torch import save_file

    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {**dict.fromkeys(stored(directory), names[0]), **dict.fromkeys(tensors, names[1])}
    (directory / "model.safetensors").rename(directory / names[0])
    save_file(tensors, directory / names[1])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_config(directory: Path, **settings: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
