"""What a layer is said to keep is what is alive after its forward."""

import pytest
import torch

from lightning_dualpipe.deepseek_v3.activations import kept_bytes
from lightning_dualpipe.deepseek_v3.block import DenseBlock, MoEBlock
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.mtp import MTP
from lightning_dualpipe.deepseek_v3.rope import Rotary
from lightning_dualpipe.precision.fp8_rows import round_expert_tokens
from lightning_dualpipe.precision.recipe import Block
from lightning_dualpipe.recompute import run_phase
from tests.deepseek_v3.kept import bytes_alive_after
from tests.deepseek_v3.small import randomize, small_config

SEQUENCES, LENGTH, HIDDEN = 2, 300, 64  # long enough that attention on CPUs keeps no probabilities
CONFIGS = {
    "small": {},
    "queries_not_compressed": {"q_lora_rank": None},
    "many_small_experts": {"n_routed_experts": 64, "n_group": 8, "num_experts_per_tok": 8, "moe_intermediate_size": 8},
    "neither_normalised_nor_shared": {"norm_topk_prob": False, "n_shared_experts": 0},
}
RECOMPUTE = ["none", "selective", "selective_fp8", "full"]


def config_of(overrides):
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": 32, "intermediate_size": 128, "kv_lora_rank": 32}
    return small_config(**{**sizes, "v_head_dim": 16, "max_position_embeddings": 512, **overrides})


def measured(phases, values, batch=None):
    """Bytes per token. The values given exist already; those returned are as large, and the next layer's."""

    def forward():
        out = values
        for phase in phases:
            out = run_phase(phase, out, batch or {})
        return out

    forward()  # the table of rotary embedding is made once
    return bytes_alive_after(forward) / (SEQUENCES * LENGTH)


def hidden_state(dtype, width=HIDDEN):
    return torch.randn(SEQUENCES, LENGTH, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_block_keeps_what_is_said(overrides, recompute, dtype):
    """2 %: what there is once per expert or sequence is not counted, a float32 copy of the router's weight included."""
    config, values = config_of(overrides), (hidden_state(dtype), torch.zeros(SEQUENCES))
    dense, moe = (
        measured(randomize(kind(config, Rotary(config), recompute=recompute)).to(dtype).phases(), values)
        for kind in (DenseBlock, MoEBlock)
    )
    said = kept_bytes(config, recompute, element=dtype.itemsize)
    assert dense == pytest.approx(said.dense_block, rel=1e-3)
    assert moe == pytest.approx(said.moe_block, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_tokens_that_travel_in_fp8_are_kept_so_where_that_is_asked_for(recompute, dtype):
    config, values = config_of({"hidden_size": 192}), (hidden_state(dtype, width=192), torch.zeros(SEQUENCES))
    block = randomize(MoEBlock(config, Rotary(config), recompute=recompute)).to(dtype)
    round_expert_tokens(block, Block())
    said = kept_bytes(config, recompute, element=dtype.itemsize, fp8_tokens=True).moe_block
    assert measured(block.phases(), values) == pytest.approx(said, rel=0.02)
    saved = kept_bytes(config, recompute, element=dtype.itemsize).moe_block - said
    assert saved == (3 * (192 * dtype.itemsize - (192 + 8)) if recompute == "selective_fp8" else 0)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_depth_of_prediction_keeps_what_is_said(recompute):
    """1 %: it has one position less than the sequence."""
    config = config_of({})
    mtp = randomize(MTP(config, Rotary(config), depth=1, recompute=recompute))
    embed = torch.nn.Embedding(config.vocab_size, HIDDEN, dtype=torch.float64)
    batch = {"input_ids": torch.randint(config.vocab_size, (SEQUENCES, LENGTH))}
    values = (hidden_state(torch.float64), torch.zeros(SEQUENCES))
    got = measured(mtp.phases(embed), values, batch)
    assert got == pytest.approx(kept_bytes(config, recompute, element=8).mtp, rel=0.01)


def test_671b_keeps_a_half_and_a_third():
    config = DeepSeekV3Config.from_preset("671b")
    none, selective, in_fp8, full = (kept_bytes(config, recompute).moe_block for recompute in RECOMPUTE)
    assert selective / none == pytest.approx(0.49, abs=0.01)
    assert full / none == pytest.approx(0.31, abs=0.01)
    # by hand, in elements: what enters, two latents and the shared key, what is attended, what enters the
    # experts; rows of 8 experts with gate and up, and those of the shared one
    elements = 7168 + 1536 + 512 + 64 + 128 * 128 + 7168 + 8 * (7168 + 2 * 2048) + 2 * 2048
    assert selective == pytest.approx(2 * elements, rel=0.01)
    # a byte and a 32nd for two of gate and up, and for tokens
    gate_up, tokens = 9 * 2 * 2048, 8 * 7168
    assert selective - in_fp8 == (1 - 1 / 32) * gate_up
    assert in_fp8 - kept_bytes(config, "selective_fp8", fp8_tokens=True).moe_block == (1 - 1 / 32) * tokens
