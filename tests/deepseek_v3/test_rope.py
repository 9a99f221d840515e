"""Rotary embedding and YaRN against their formulas and the released model's numbers."""

import copy
import math
import pickle

import pytest
import torch

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config, YarnConfig
from lightning_dualpipe.deepseek_v3.rope import Rotary, frequencies, softmax_scale
from tests.deepseek_v3.small import small_config
from tests.oracles import deepseek_v3 as oracle

SCALINGS = {
    "plain": None,
    "released": YarnConfig(factor=40, mscale=1.0, mscale_all_dim=1.0),
    "v2_lite": YarnConfig(factor=40, mscale=0.707, mscale_all_dim=0.707),
    "mscales_differ": YarnConfig(factor=4, original_max_position_embeddings=64, mscale=1.3, mscale_all_dim=0.6),
    "one_mscale_missing": YarnConfig(factor=4, mscale_all_dim=1.0),
    "no_mscale": YarnConfig(factor=4),
    "given_attention_factor": YarnConfig(factor=4, attention_factor=0.7, mscale=1.0),
    "not_truncated": YarnConfig(factor=40, original_max_position_embeddings=512, truncate=False),
    "shorter_than_a_turn": YarnConfig(factor=2, original_max_position_embeddings=4),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_is_that_of_the_definition(scaling, interleave):
    config = small_config(rope_scaling=scaling, rope_interleave=interleave, qk_rope_head_dim=16, rope_theta=5e4)
    x = torch.randn(2, 9, 3, 16, dtype=torch.float64)

    y = Rotary(config)(x)

    want = torch.stack([torch.stack([oracle.rotate(config, x[b, :, h]) for h in range(3)], dim=1) for b in range(2)])
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(frequencies(config).tolist(), oracle.frequencies(config), rtol=1e-14, atol=0)
    assert softmax_scale(config) == pytest.approx(oracle.softmax_scale(config), rel=1e-15)


def test_the_released_softmax_scale():
    plain = DeepSeekV3Config(rope_scaling=None)
    released = DeepSeekV3Config.from_preset("671b")
    v2_lite = DeepSeekV3Config(rope_scaling=SCALINGS["v2_lite"])

    assert softmax_scale(plain) == pytest.approx(0.0721688, abs=1e-7)
    assert softmax_scale(released) == pytest.approx(0.1352338, abs=1e-7)
    assert softmax_scale(v2_lite) / softmax_scale(plain) == pytest.approx(1.5896262, abs=1e-7)


def test_the_released_frequencies_keep_fast_pairs_and_divide_slow_ones_by_40():
    """32 rotations within 4096 positions are between pairs 10 and 11 of 32, one between 22 and 23."""
    plain = frequencies(DeepSeekV3Config(rope_scaling=None))
    stretched = frequencies(DeepSeekV3Config.from_preset("671b"))

    ratio = (plain / stretched).tolist()
    assert ratio[:11] == [1.0] * 11
    assert ratio[23:] == pytest.approx([40.0] * 9)
    assert all(1 < r < 40 for r in ratio[11:23]) and sorted(ratio) == ratio


def test_turning_depends_on_distance_only():
    rotary = Rotary(small_config(rope_scaling=None))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned_q, turned_k = (rotary(x.expand(50, 1, 8))[:, 0] for x in (q, k))

    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[7, 4], scores[49, 46], rtol=1e-12, atol=1e-12)


def test_rotation_does_not_change_lengths_and_leaves_position_0_alone():
    x = torch.randn(5, 1, 8)
    y = Rotary(small_config(rope_scaling=None))(x)

    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[0], x[0])


def test_angles_are_exact_at_the_far_end_of_the_context():
    """In float32 position 131071 times a frequency of 1 would be off by 0.004 rad."""
    config = small_config(rope_scaling=None)
    x = torch.zeros(131072, 1, 8)
    x[..., 0] = 1
    y = Rotary(config)(x)[-1, 0]

    assert y[0].item() == pytest.approx(math.cos(131071), abs=1e-6)
    assert y[1].item() == pytest.approx(math.sin(131071), abs=1e-6)


def test_tables_grow_and_follow_dtype():
    rotary = Rotary(small_config())
    x = torch.randn(1, 40, 1, 8, dtype=torch.float64)
    short = rotary(x[:, :3])

    assert torch.equal(rotary(x)[:, :3], short)
    assert rotary(x.float()).dtype == torch.float32
    assert rotary(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(rotary(x.bfloat16()), rotary(x.bfloat16().double()).bfloat16())
    assert torch.equal(rotary(x)[:, :3], short), "float64 is not served from a table of another precision"


def test_a_table_made_in_inference_mode_can_be_trained_with():
    rotary = Rotary(small_config())
    with torch.inference_mode():
        rotary(torch.randn(1, 5, 1, 8))
    x = torch.randn(1, 5, 1, 8, requires_grad=True)

    rotary(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x, rtol=0.5, atol=0.5)


def test_no_positions_at_all():
    assert Rotary(small_config())(torch.randn(2, 0, 3, 8)).shape == (2, 0, 3, 8)


def test_copies_and_pickles_leave_the_tables_behind():
    rotary = Rotary(small_config())
    x = torch.randn(1, 5, 1, 8)
    y = rotary(x)

    for clone in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(clone(x), y)
