"""Counting without building: the published numbers, and equality with what is built."""

import pytest
import torch

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.count import count_parameters, forward_flops, training_flops
from lightning_dualpipe.deepseek_v3.model import Transformer
from tests.deepseek_v3.small import small_config


def test_671b_has_the_published_numbers_of_parameters():
    count = count_parameters(DeepSeekV3Config.from_preset("671b"))

    assert count.total == 671_026_419_200
    assert count.activated.total == 37_552_297_472
    assert count.activated.total - count.activated.embedding == 36_625_618_432
    assert count.activated.total - count.activated.embedding - count.activated.head == 35_698_939_392
    assert count.mtp.total == 11_610_068_224
    assert count.main.embedding == count.main.head == 926_679_040
    assert count.mtp_activated.total + count.main.embedding + count.main.head == 2_541_458_688
    assert count.main.attention == 61 * 187_107_328
    assert count.main.dense_ffn == 3 * 396_361_728
    assert count.main.routed_experts == 58 * 256 * 44_040_192
    assert count.main.shared_experts == 58 * 44_040_192
    assert count.main.router == 58 * (1_835_008 + 256)
    assert count.mtp.projection == 102_760_448
    # As stored: every depth repeats embedding and head.
    assert count.total_with_mtp + count.main.embedding + count.main.head == 684_489_845_504


def test_16b_has_the_published_number_of_parameters():
    count = count_parameters(DeepSeekV3Config.from_preset("16b"))
    without_bias = count.total - 26 * 64  # DeepSeek-V2-Lite's router has none

    assert without_bias == 15_706_484_224
    assert round(count.activated.total / 1e9, 2) == 2.66


def test_tiny_and_small_are_as_large_as_they_say():
    assert 2_000_000 < count_parameters(DeepSeekV3Config.from_preset("tiny")).total_with_mtp < 3_000_000
    assert 90_000_000 < count_parameters(DeepSeekV3Config.from_preset("small")).total < 110_000_000


@pytest.mark.parametrize(
    "config",
    [
        DeepSeekV3Config.from_preset("tiny"),
        DeepSeekV3Config.from_preset("671b"),
        small_config(),
        small_config(tie_word_embeddings=True, q_lora_rank=None),
        small_config(attention_bias=True, n_shared_experts=0, num_nextn_predict_layers=0),
        small_config(attention_bias=True, q_lora_rank=None, first_k_dense_replace=3),
    ],
)
def test_the_count_is_that_of_the_built_model(config):
    with torch.device("meta"):
        model = Transformer(config)
    mtp = sum(p.numel() for name, p in model.state_dict().items() if name.startswith("mtp."))
    everything = sum(p.numel() for p in (*model.parameters(), *model.buffers()))

    count = count_parameters(config)
    assert count.mtp.total == mtp
    assert count.total_with_mtp == everything


def test_a_count_prints_as_a_table():
    table = str(count_parameters(DeepSeekV3Config.from_preset("671b")))

    assert "671,026,419,200" in table and "37,552,297,472" in table and "11,610,068,224" in table
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["embedding", "attention", "dense_ffn"]


def test_671b_costs_the_published_arithmetic():
    config = DeepSeekV3Config.from_preset("671b")

    assert training_flops(config, 4096, mtp=False) == pytest.approx(250.4e9, abs=0.1e9)
    assert training_flops(config, 4096) == pytest.approx(260.6e9, abs=0.1e9)


def test_a_block_costs_its_matrices_and_half_the_sequence():
    """By hand: hidden 24, 3 heads of 6 + 8 and 5, ranks 14 and 10, 3 of 12 experts and 2 shared ones of width 12."""
    flops = forward_flops(small_config(), 100)

    attention = 2 * (24 * 14 + 14 * 3 * 14 + 24 * 18 + 10 * 3 * 11 + 3 * 5 * 24) + 2 * 3 * (14 + 5) * 50
    assert flops.dense_block == attention + 2 * 3 * 24 * 40
    assert flops.moe_block == attention + 2 * (12 * 24 + 5 * 3 * 24 * 12)
    assert flops.mtp == flops.moe_block + 2 * 24 * 48
    assert flops.head == 2 * 24 * 29
