"""FP8 in the released format: what is written is what the format says, and it comes back to the last bit."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dualpipe import DeepSeekV3, TextDataModule
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.convert import load_pretrained, read_pretrained_config, save_pretrained
from lightning_dualpipe.deepseek_v3.hf_config import config_from_hf
from lightning_dualpipe.deepseek_v3.hf_fp8 import WEIGHT_OPERANDS, dequantise, is_in_fp8, quantise_weight, scale_shape
from lightning_dualpipe.deepseek_v3.hf_names import Part, key_of, parts_of
from lightning_dualpipe.deepseek_v3.hf_plan import export_plan
from lightning_dualpipe.deepseek_v3.hf_writer import save_weights
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.convert import convert
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.recipe import Block
from lightning_dualpipe.precision.reference import Quantised, multiply, quantise
from tests.marks import needs
from tests.oracles.fp8_release import e4m3, from_released_format, released_tensors, to_e4m3, to_released_format
from tests.strategy.runs import QUIET, SHAPE, write_corpus

pytestmark = [needs("safetensors"), pytest.mark.filterwarnings("ignore:transformers .5.23. reads")]

# Blocks of 128 end in the middle of most matrices: 2 x 2 blocks in a dense layer, 1 x 2 in an expert.
CONFIG = DeepSeekV3Config(
    vocab_size=41,
    hidden_size=150,
    intermediate_size=140,
    moe_intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=30,
    kv_lora_rank=16,
    qk_nope_head_dim=60,
    qk_rope_head_dim=8,
    v_head_dim=70,
    max_position_embeddings=64,
)
FLOAT32, POWER_OF_TWO = WEIGHT_OPERANDS["float8_block"], WEIGHT_OPERANDS["float8_block_power_of_two"]
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


# ---- the format -----------------------------------------------------------------------------------


def test_the_oracle_knows_the_numbers_that_torch_knows():
    codes = torch.arange(256, dtype=torch.uint8)
    ours, torchs = torch.tensor([e4m3(code) for code in codes.tolist()]), codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(ours.nan_to_num(nan=999.0), torchs.nan_to_num(nan=999.0))
    between = torch.cat([(torchs[:-1] + torchs[1:]) / 2, torch.randn(1000) * 100]).nan_to_num(nan=1.0).clamp(-448, 448)
    rounded = torch.tensor([to_e4m3(x) for x in between.tolist()], dtype=torch.uint8)
    assert torch.equal(rounded, between.to(torch.float8_e4m3fn).view(torch.uint8))


def test_the_plan_of_the_671b_model_is_the_released_one_by_name_dtype_and_shape():
    spelt = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    files = export_plan(DeepSeekV3Config.from_preset("671b"), dtype="float8_block")
    planned = {key: (spelt[tensor.dtype], list(tensor.shape)) for file in files for key, tensor in file.tensors.items()}
    released = released_tensors()
    assert len(released) == 91_991 and planned == released

    numbers = dict.fromkeys(spelt, 0)
    for file in files:
        for tensor in file.tensors.values():
            numbers[tensor.dtype] += tensor.size // tensor.dtype.itemsize
    biases = 59 * 256
    assert list(numbers.values()) == [680_571_043_840, 3_918_786_560, 41_540_496 + biases]
    assert sum(file.size for file in files) == 688_574_839_360
    assert all(4e9 < file.size <= 5e9 for file in files[:-1])
    assert [file.name for file in files[:2]] == [f"model-0000{i}-of-{len(files):05d}.safetensors" for i in (1, 2)]


def test_the_plan_of_the_671b_model_in_bfloat16_is_the_released_one_without_scales():
    files = export_plan(DeepSeekV3Config.from_preset("671b"))
    planned = {key: tensor for file in files for key, tensor in file.tensors.items()}
    released = {key: shape for key, (_, shape) in released_tensors().items() if not key.endswith("_scale_inv")}
    assert {key: list(tensor.shape) for key, tensor in planned.items()} == released
    assert {tensor.dtype for key, tensor in planned.items() if not key.endswith("bias")} == {torch.bfloat16}
    assert sum(file.size for file in files) == 2 * 684_489_845_504 + 2 * 59 * 256


OTHERS = {
    "no_shared_experts": replace(CONFIG, n_shared_experts=0, num_nextn_predict_layers=2),
    "tied_bias_no_compression": replace(CONFIG, tie_word_embeddings=True, q_lora_rank=None, attention_bias=True),
}


@pytest.mark.parametrize(
    ("config", "dtype", "max_shard_size"),
    [
        (CONFIG, "bfloat16", 20_000),
        (CONFIG, "float8_block", 20_000),
        (CONFIG, "float8_block_power_of_two", "5GB"),
        *((config, dtype, 20_000) for config in OTHERS.values() for dtype in ("float64", "float8_block")),
    ],
)
def test_an_export_writes_what_was_planned(config, dtype, max_shard_size, tmp_path):
    from safetensors import safe_open

    save_pretrained(new_model(config), tmp_path, dtype=dtype, max_shard_size=max_shard_size)
    plan = export_plan(config, dtype=dtype, max_shard_size=max_shard_size)
    written: dict[str, dict[str, Any]] = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            written[path.name] = {key: (tuple((t := file.get_tensor(key)).shape), t.dtype) for key in file.keys()}  # noqa: SIM118
    assert written == {file.name: {k: (t.shape, t.dtype) for k, t in file.tensors.items()} for file in plan}
    assert len(plan) == 1 if max_shard_size == "5GB" else len(plan) > 10


def test_config_json_says_how_weights_are_quantised_and_only_then(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float8_block")
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    assert read_pretrained_config(tmp_path) == CONFIG
    for dtype in ("bfloat16", "float32"):
        save_pretrained(model, tmp_path, dtype=dtype, overwrite=True)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# ---- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [FLOAT32, POWER_OF_TWO], ids=lambda how: how.scales)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(576, 300), (128, 128), (1100, 140), (5, 3), (130, 1)])
def test_trained_weights_are_quantised_by_the_definition(shape, dtype, how):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.02
    values, scales = quantise_weight("w", weight, how)
    expected = quantise(weight, how)
    assert torch.equal(bits(values), bits(expected.values_MK)) and torch.equal(scales, expected.inverse_scales)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == scale_shape(shape)


def test_every_expert_has_blocks_of_its_own_and_so_have_its_gate_and_up(tmp_path):
    """Each is of another size than its neighbours, so that a shared scale would show."""
    model = new_model(CONFIG)
    stacks = [part.tensor.data for part in parts_of(model) if ".experts." in part.name]
    for stack in stacks:
        stack *= torch.logspace(-3, 3, len(stack) * 2).repeat_interleave(stack.shape[1] // 2).view(*stack.shape[:2], 1)
    save_pretrained(model, tmp_path, dtype="float8_block")
    save_pretrained(model, tmp_path / "exact", dtype="float32")
    exact, written = stored(tmp_path / "exact"), stored(tmp_path)
    for key in exact:
        if not is_in_fp8(key):
            wanted = exact[key] if key.endswith("correction_bias") else exact[key].bfloat16()
            assert torch.equal(written[key], wanted), key
            continue
        read = from_released_format(written[key], written[f"{key}_scale_inv"])
        rows, columns = exact[key].shape
        for p in range(0, rows, 128):
            for q in range(0, columns, 128):
                block, again = (x[p : p + 128, q : q + 128] for x in (exact[key], read))
                # half of the step between numbers of 4 bits, or of the smallest that FP8 has
                bound = (block.abs() * 2.0**-4).clamp(min=float(block.abs().max()) / 448 * 2.0**-10) * (1 + 1e-5)
                assert ((block - again).abs() <= bound).all(), key


def test_parts_may_come_in_any_order_and_experts_a_few_at_a_time(tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path / "whole", dtype="float8_block")
    pieces: list[Part] = []
    for part in parts_of(model):
        split = len(part.tensor) if ".experts." in part.name else 1
        pieces += [Part(part.name, part.tensor[i:][: 1 if split > 1 else None], i) for i in range(split)]
    save_weights(reversed(pieces), CONFIG, tmp_path / "pieces", dtype="float8_block")
    assert_same_files(tmp_path / "whole", tmp_path / "pieces")


def test_writing_holds_at_most_one_shard_in_memory(tmp_path):
    handed_over, waiting = 0, []

    def parts() -> Iterator[Part]:
        nonlocal handed_over
        for part in parts_of(new_model(replace(CONFIG, num_nextn_predict_layers=0))):
            yield part
            handed_over += part.tensor.numel()  # bytes at least, in FP8
            waiting.append(handed_over - sum(bits(t).numel() for t in stored(tmp_path / ".incomplete").values()))

    config = replace(CONFIG, num_nextn_predict_layers=0)
    save_weights(parts(), config, tmp_path, dtype="float8_block", max_shard_size=30_000)
    assert handed_over > 150_000 and max(waiting) <= 30_000


# ---- import ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales_elsewhere", [False, True], ids=["one_file", "scales_in_another_shard"])
def test_a_checkpoint_in_the_released_format_loads_number_by_number_and_goes_back_bit_by_bit(
    scales_elsewhere, tmp_path
):
    released(tmp_path / "released", scales_elsewhere)
    model = Transformer(read_pretrained_config(tmp_path / "released"), seed=9)
    load_pretrained(model, tmp_path / "released")

    save_pretrained(model, tmp_path / "plain", dtype="float32")
    read, files = stored(tmp_path / "plain"), stored(tmp_path / "released")
    in_fp8 = [key for key in read if f"{key}_scale_inv" in files]
    assert len(in_fp8) == 2 * 5 + 3 + 3 * (4 + 1) + (5 + 15)  # attention, dense, experts, prediction
    for key, tensor in read.items():
        scale = files.get(f"{key}_scale_inv")
        expected = files[key].float() if scale is None else from_released_format(files[key], scale)
        assert torch.equal(tensor, expected), key

    save_pretrained(model, tmp_path / "again", dtype="float8_block")
    assert_same_files(tmp_path / "released", tmp_path / "again")


def test_an_export_goes_through_import_and_export_bit_by_bit(tmp_path):
    save_pretrained(new_model(CONFIG), tmp_path / "first", dtype="float8_block")
    save_pretrained(reloaded(tmp_path / "first"), tmp_path / "second", dtype="float8_block")
    assert_same_files(tmp_path / "first", tmp_path / "second")


def test_blocks_of_another_size_than_the_release_are_read(tmp_path):
    from safetensors.torch import save_file

    save_pretrained(new_model(CONFIG), tmp_path, dtype="float8_block")
    tensors = stored(tmp_path)
    scales = torch.rand(scale_shape(tuple(tensors[O_PROJ].shape), (64, 32)), generator=torch.Generator().manual_seed(1))
    for key in list(tensors):
        if key.endswith("_scale_inv"):
            shape = scale_shape(tuple(tensors[key.removesuffix("_scale_inv")].shape), (64, 32))
            tensors[key] = scales if key.startswith(O_PROJ) else torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, weight_block_size=[64, 32])
    expected = from_released_format(tensors[O_PROJ], scales, (64, 32))
    assert torch.equal(reloaded(tmp_path).blocks[0].self_attn.o_proj.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16])
def test_scales_in_another_format_are_read(dtype, tmp_path):
    from safetensors.torch import save_file

    save_pretrained(new_model(CONFIG), tmp_path, dtype="float8_block_power_of_two")
    expected, tensors = reloaded(tmp_path), stored(tmp_path)
    scales = {key: tensor.to(dtype) for key, tensor in tensors.items() if key.endswith("_scale_inv")}
    save_file(tensors | scales, tmp_path / "model.safetensors")
    assert_same_parts(reloaded(tmp_path), expected)


def test_through_bfloat16_the_values_come_back_and_scales_to_the_precision_of_bfloat16(tmp_path):
    released(tmp_path / "released")
    model = Transformer(CONFIG, seed=9).bfloat16()
    load_pretrained(model, tmp_path / "released")
    save_pretrained(model, tmp_path / "again", dtype="float8_block")
    first, second = stored(tmp_path / "released"), stored(tmp_path / "again")
    scales = [key for key in first if key.endswith("_scale_inv")]
    assert first.keys() == second.keys() and scales
    assert all(torch.equal(bits(first[key]), bits(second[key])) for key in first if key not in scales)
    assert all(torch.allclose(second[key], first[key], rtol=2.0**-8, atol=0) for key in scales)
    assert not all(torch.equal(second[key], first[key]) for key in scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_are_powers_of_two_lose_nothing_even_in_bfloat16(dtype, tmp_path):
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path / "first", dtype="float8_block_power_of_two")
    scales = torch.cat([t.flatten() for key, t in stored(tmp_path / "first").items() if key.endswith("_scale_inv")])
    assert (scales.frexp().mantissa == 0.5).all() and scales.unique().numel() > 1
    loaded = Transformer(CONFIG, seed=9).to(dtype)
    load_pretrained(loaded, tmp_path / "first")
    for again in ("float8_block", "float8_block_power_of_two"):
        save_pretrained(loaded, tmp_path / again, dtype=again)
        assert_same_parts(reloaded(tmp_path / again), reloaded(tmp_path / "first"))


# ---- coming back to the last bit ------------------------------------------------------------------


def all_values(rows: int, columns: int) -> Tensor:
    """E4M3 [rows, columns] in which every number occurs, 448 among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(-(-rows * columns // 254))[: rows * columns]
    return codes.view(torch.float8_e4m3fn).view(rows, columns)


def some_scales(count: int) -> Tensor:
    """float32 of all mantissas alike, and of many sizes."""
    generator = torch.Generator().manual_seed(4)
    mantissas = torch.randint(2**23, (count,), generator=generator)
    exponents = torch.randint(127 - 40, 127 + 40, (count,), generator=generator)
    return (mantissas | exponents << 23).int().view(torch.float32)


def test_blocks_of_every_scale_come_back_and_would_not_if_scales_were_computed_anew():
    mantissas = torch.arange(2**23, dtype=torch.int32).add_(127 << 23).view(torch.float32)
    again = torch.div(torch.full_like(mantissas, 448), mantissas * 448).reciprocal()
    away = again.view(torch.int32) - mantissas.view(torch.int32)
    assert [int((away.abs() == units).sum()) for units in (0, 1, 2)] == [5_865_106, 2_522_039, 1_463]
    farthest = torch.cat([mantissas[away == 2][:5], mantissas[away == -2][:5]])

    scales = torch.cat([some_scales(390), farthest * 2.0**-12])
    blocks = len(scales)
    values = all_values(128, 2).repeat(1, blocks).view(128, 2 * blocks)
    # each block 2 columns wide, stretched to 128 by zeros, which have no say in the scale
    wide = torch.zeros(128, 128 * blocks, dtype=torch.float8_e4m3fn).view(torch.uint8)
    wide.view(128, blocks, 128)[..., :2] = bits(values).view(128, blocks, 2)
    weight = dequantise(wide.view(torch.float8_e4m3fn), scales[None], (128, 128))

    again, scales_again = quantise_weight("w", weight, FLOAT32)
    assert torch.equal(bits(again.float()), bits(wide.view(torch.float8_e4m3fn).float()))  # -0.0 included
    assert torch.equal(scales_again[0], scales)

    anew = quantise(weight, FLOAT32)
    units = (anew.inverse_scales[0].view(torch.int32) - scales.view(torch.int32)).abs()
    assert torch.equal(bits(anew.values_MK), bits(again)), "the values never change, only the scales"
    assert 0.25 < (units > 0).float().mean() < 0.4 and int(units.max()) == 2


@pytest.mark.parametrize("largest", [224.0, 240.0, 256.0, 416.0, 448.0])
def test_a_block_with_a_power_of_two_whose_largest_value_is_not_448_is_not_rounded_again(largest):
    values = all_values(128, 128).float().clamp(-largest, largest).to(torch.float8_e4m3fn)
    scales = torch.tensor([[2.0**-9]])
    weight = dequantise(values, scales, (128, 128))
    again, scales_again = quantise_weight("w", weight, FLOAT32)
    assert torch.equal(dequantise(again, scales_again, (128, 128)), weight)
    if largest > 224:  # of 224 twice the values at half the scale are the same numbers
        assert torch.equal(bits(again), bits(values)) and torch.equal(scales_again, scales)


def test_only_the_blocks_that_came_from_fp8_are_taken_back():
    """A layer that was frozen beside one that was trained, in the same band of rows."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    scales = some_scales(200)
    own = torch.div(torch.full_like(scales, 448), 448 * scales).reciprocal()
    scale = scales[own != scales][0]
    weight[128:, :128] = dequantise(all_values(128, 128), scale[None, None], (128, 128))
    values, scales_again = quantise_weight("w", weight, FLOAT32)
    expected = quantise(weight, FLOAT32)
    assert torch.equal(bits(values), bits(expected.values_MK))
    assert scales_again[1, 0] == scale != expected.inverse_scales[1, 0]
    scales_again[1, 0] = expected.inverse_scales[1, 0]
    assert torch.equal(scales_again, expected.inverse_scales)


def test_a_block_of_zeros_has_scale_1_and_comes_back():
    weight = torch.zeros(130, 130)
    weight[0, 129] = 1.0
    values, scales = quantise_weight("w", weight, FLOAT32)
    assert scales.tolist() == [[1.0, pytest.approx(1 / 448)], [1.0, 1.0]]
    assert torch.equal(dequantise(values, scales, (128, 128)), weight)


# ---- FP8 training and files -----------------------------------------------------------------------


def in_fp8_layers(name: str, layer: nn.Module) -> bool:
    return ".self_attn." in name or ".mlp." in name


def test_training_in_fp8_multiplies_by_the_values_that_were_released():
    """The weights were dequantised when they were imported; quantised again they are the same."""
    values, scales = all_values(300, 200), some_scales(6).view(3, 2)
    layer = nn.Linear(200, 300, bias=False)
    layer.weight.data = dequantise(values, scales, (128, 128))
    convert(layer, EmulateBackend(Block("float32")), lambda name, layer: True)
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = layer(x)

    requantised = quantise(layer.weight.detach(), FLOAT32)
    assert torch.equal(bits(requantised.values_MK), bits(values))
    expected = multiply(quantise(x.detach(), Block("float32").activation), Quantised(values, scales, (128, 128)))
    torch.testing.assert_close(y.detach(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))

    layer.weight.data = dequantise(values, torch.full((3, 2), 2.0**-5), (128, 128))
    exact = multiply(
        quantise(x.detach(), Block("float32").activation),
        Quantised(values, torch.full((3, 2), 2.0**-5), (128, 128)),
    )
    assert torch.equal(layer(x).detach(), exact)


def test_a_model_in_fp8_has_the_keys_and_writes_the_files_of_one_that_is_not(tmp_path):
    plain, converted = new_model(CONFIG), new_model(CONFIG)
    names = convert(converted, EmulateBackend(Block()), in_fp8_layers)
    assert len(names) == 3 * 5 + 3 + 2 * (1 + 3)  # attention; dense; experts and shared expert
    assert converted.state_dict().keys() == plain.state_dict().keys()
    batch = {"input_ids": torch.randint(41, (1, 8), generator=torch.Generator().manual_seed(3))}
    assert not torch.equal(converted(batch), plain(batch))

    for dtype in ("bfloat16", "float8_block"):
        for model, folder in ((plain, "plain"), (converted, "converted")):
            save_pretrained(model, tmp_path / dtype / folder, dtype=dtype)
        assert_same_files(tmp_path / dtype / "plain", tmp_path / dtype / "converted")
    load_pretrained(converted, tmp_path / "float8_block" / "plain")
    assert_same_parts(converted, reloaded(tmp_path / "float8_block" / "plain"))


def test_weights_loaded_into_a_model_in_fp8_are_the_ones_it_multiplies_by(tmp_path):
    """It keeps its weights quantised between steps; those of before must not be used."""
    model = new_model(CONFIG)
    save_pretrained(model, tmp_path, dtype="float32")
    other = Transformer(CONFIG, seed=9)
    for each in (model, other):
        convert(each, EmulateBackend(Block()), in_fp8_layers)
    batch = {"input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        assert not torch.equal(other(batch), model(batch))
        load_pretrained(other, tmp_path)
        assert torch.equal(other(batch), model(batch))


class InFP8(DeepSeekV3):
    def configure_model(self) -> None:
        super().configure_model()
        convert(self.model, EmulateBackend(Block()), in_fp8_layers)


@pytest.mark.parametrize("first", [InFP8, DeepSeekV3])
def test_checkpoints_go_from_runs_in_fp8_to_others_and_back(first, tmp_path):
    second = {InFP8: DeepSeekV3, DeepSeekV3: InFP8}[first]
    data = TextDataModule(write_corpus(tmp_path), sequence_length=16, batch_size=2, cache_dir=tmp_path / "cache")
    overrides: Any = {**SHAPE, "num_hidden_layers": 2}
    L.seed_everything(1, verbose=False)
    run = L.Trainer(accelerator="cpu", devices=1, max_steps=1, **QUIET)
    run.fit(module := first("tiny", overrides), data)
    run.save_checkpoint(tmp_path / "last.ckpt")

    other = second("tiny", overrides)
    again = L.Trainer(accelerator="cpu", devices=1, max_steps=2, **QUIET)
    again.fit(other, data, ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 2 and again.callback_metrics["train_loss"].isfinite()
    loaded = second.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in loaded.state_dict().items())


# ---- other programs -------------------------------------------------------------------------------


@needs("transformers")
def test_transformers_reads_the_same_numbers(tmp_path, monkeypatch):
    """Into float32, on the CPU. It asks for accelerate, and then uses nothing of it."""
    from transformers import DeepseekV3ForCausalLM, FineGrainedFP8Config
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    sizes = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128}
    sizes |= {"kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_nextn_predict_layers": 0}
    config = replace(CONFIG, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(new_model(config), tmp_path, dtype="float8_block")
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    read = theirs.state_dict()
    ours = {key_of(part.name, config): part.tensor for part in parts_of(reloaded(tmp_path))}
    assert ours.keys() == read.keys()
    assert all(torch.equal(read[key].float(), tensor) for key, tensor in ours.items())


@pytest.mark.filterwarnings("default:transformers .5.23. reads")
def test_blocks_that_transformers_would_mistake_are_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"reads \d+ weights in .* wrongly.*self_attn.*multiples of 128"):
        save_pretrained(new_model(CONFIG), tmp_path, dtype="float8_block")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(new_model(CONFIG), tmp_path, dtype="bfloat16", overwrite=True)


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_place(bad, tmp_path):
    model = new_model(CONFIG)
    with torch.no_grad():
        model.blocks[1].mlp.experts.gate_up_proj[2, 25, 7] = bad  # row 5 of up, behind the 20 of gate
    words = rf"layers.1.mlp.experts.2.up_proj.weight holds {bad} in row 5, column 7"
    with pytest.raises(ConfigurationError, match=words):
        save_pretrained(model, tmp_path, dtype="float8_block")
    assert not list(tmp_path.iterdir())
    save_pretrained(model, tmp_path, dtype="float32")


def test_the_place_of_a_number_is_right_in_later_bands_and_for_what_float32_cannot_hold():
    weight = torch.zeros(2100, 3, dtype=torch.float64)
    weight[2090, 2] = 1e39
    with pytest.raises(ConfigurationError, match="w holds inf in row 2090, column 2"):
        quantise_weight("w", weight, FLOAT32)


@pytest.mark.parametrize("dtype", ["fp8", "float8_e4m3fn", "float16", None])
def test_an_unknown_dtype_lists_the_known_ones(dtype, tmp_path):
    with pytest.raises(ConfigurationError, match="bfloat16, float32, float64, float8_block, float8_block_power_of_two"):
        save_pretrained(new_model(CONFIG), tmp_path, dtype=dtype)
    with pytest.raises(ConfigurationError, match="is not written; use one of"):
        export_plan(CONFIG, dtype=dtype)


def nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{O_PROJ}_scale_inv"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(f"{O_PROJ}_scale_inv"), "o_proj.weight is F8_E4M3 without .*o_proj.weight_scale"),
        (
            lambda tensors: tensors.update({f"{O_PROJ}_scale_inv": torch.ones(1, 2)}),
            r"_scale_inv is \[1, 2\], blocks of \[128, 128\] need \[2, 2\]",
        ),
        (
            lambda tensors: tensors.update({f"{O_PROJ}_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}),
            "_scale_inv is U8, scales are F32",
        ),
        (nan_scale, "o_proj.weight_scale_inv holds NaN or infinity"),
        (
            lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ].float().to(torch.float8_e5m2)}),
            "o_proj.weight is F8_E5M2",
        ),
        (
            lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ].bfloat16()}),
            "1 tensor with FP8 scales beside them that are not in FP8: .*o_proj.weight is BF16; .* remove the scales",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_and_leave_the_model_alone(change, words, tmp_path):
    from safetensors.torch import save_file

    save_pretrained(new_model(CONFIG), tmp_path, dtype="float8_block")
    tensors = stored(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = Transformer(CONFIG, seed=9)
    with pytest.raises(ConfigurationError, match=words):
        load_pretrained(model, tmp_path)
    assert_same_parts(model, Transformer(CONFIG, seed=9))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"fmt": "e5m2"}, "fmt='e5m2'.*only 'e4m3'.*bf16 instead"),
        ({"quant_method": "awq"}, "quant_method='awq'.*bf16 instead"),
        ({"weight_block_size": [128]}, r"weight_block_size=\[128\] must be two sizes"),
        ({"weight_block_size": None}, "weight_block_size=None must be two sizes"),
        ({"weight_block_size": [64, 64]}, r"blocks of \[64, 64\] need \[\d+, \d+\]"),
    ],
)
def test_another_quantisation_than_the_files_have_is_refused(quantization, words, tmp_path):
    save_pretrained(new_model(CONFIG), tmp_path, dtype="float8_block")
    settings = edit_config(tmp_path, **quantization)
    with pytest.raises(ConfigurationError, match=words):
        load_pretrained(Transformer(CONFIG), tmp_path)
    if quantization != {"weight_block_size": [64, 64]}:  # which is fine by itself
        with pytest.raises(ConfigurationError, match=words):
            config_from_hf(settings)


# ---- helpers --------------------------------------------------------------------------------------


def new_model(config: DeepSeekV3Config) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    for part in parts_of(model):
        part.tensor.data.normal_(generator=generator).mul_(0.1)
    return model


_done: dict[str, tuple[Tensor, Tensor]] = {}


def in_released_format(key: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``new_model(CONFIG)``, computed once: loops over numbers take their time."""
    if key not in _done:
        _done[key] = to_released_format(weight)
    return _done[key]


def released(directory: Path, scales_elsewhere: bool = False) -> None:
    """A directory as DeepSeek publishes them, by the oracle: what is quantised, how, and what config.json says."""
    from safetensors.torch import save_file

    save_pretrained(new_model(CONFIG), directory, dtype="float32")
    quantised, scales = {}, {}
    for key, tensor in stored(directory).items():
        last = key.split(".")[-2]
        if last.endswith(("_proj", "_with_mqa")) and last != "eh_proj":
            quantised[key], scales[f"{key}_scale_inv"] = in_released_format(key, tensor)
        else:
            quantised[key] = tensor if key.endswith("correction_bias") else tensor.bfloat16()
    (directory / "model.safetensors").unlink()
    if scales_elsewhere:
        names = ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors")
        save_file(quantised, directory / names[0])
        save_file(scales, directory / names[1])
        weight_map = {**dict.fromkeys(quantised, names[0]), **dict.fromkeys(scales, names[1])}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(quantised | scales, directory / "model.safetensors")
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    settings["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(settings))


def edit_config(directory: Path, **quantization: Any) -> dict[str, Any]:
    path = directory / "config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    settings["quantization_config"] |= quantization
    path.write_text(json.dumps(settings))
    return settings


def reloaded(directory: Path) -> Transformer:
    model = Transformer(read_pretrained_config(directory), seed=9)
    load_pretrained(model, directory)
    return model


def stored(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


def bits(tensor: Tensor) -> Tensor:
    """Bytes: equal numbers of FP8 have no ``torch.equal``, and -0.0 is another number than 0.0."""
    return tensor.contiguous().view(torch.uint8)


def assert_same_files(first: Path, second: Path) -> None:
    ours, theirs = stored(first), stored(second)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(bits(tensor), bits(theirs[key])), key


def assert_same_parts(actual: Transformer, expected: Transformer) -> None:
    wanted, found = ({part.name: part.tensor for part in parts_of(model)} for model in (expected, actual))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
