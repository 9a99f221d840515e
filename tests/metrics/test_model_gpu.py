"""``benchmarks/model_gpu.py`` measures a GPU; here its code runs on whatever there is, with shapes of no interest."""

import json

import pytest
import torch

from benchmarks import model_gpu
from benchmarks.model_gpu import Subject, figure, main, ratio_of
from lightning_dualpipe.deepseek_v3.count import forward_flops
from tests.marks import needs, needs_cuda


@needs("transformers")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_both_implementations_are_measured_with_the_same_weights(device, tmp_path, capsys):
    main(["--device", device, "--tiny", "--json", "result.json"])
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("block", "small"):
        assert result[name]["ours"]["tflops"] > 0 and result[name]["transformers"]["tflops"] > 0
        assert result[name]["ratio"] > 0
    assert "ours is" in capsys.readouterr().out

    arguments = model_gpu.parse(["--tiny"])
    for subject in (model_gpu.block_subject, model_gpu.model_subject):
        ours, theirs = (step() for step in subject(arguments, torch.device(device)).steps.values())
        # bfloat16 has 8 bits: a token in a hundred may go to another expert
        assert (ours - theirs).float().norm() < 0.1 * ours.float().norm()


def test_without_transformers_ours_is_measured_alone(capsys):
    main(["--device", "cpu", "--tiny", "--only", "block", "--without-transformers"])
    assert "transformers is left out" in capsys.readouterr().out


def test_without_a_gpu_it_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures a CUDA device and torch sees none here") as end:
        main([])
    assert "\n" not in str(end.value)


def test_the_block_has_the_widths_of_the_released_model():
    block = model_gpu.configs(tiny=False, experts=32)["block"]
    assert (block.hidden_size, block.num_attention_heads, block.q_lora_rank, block.kv_lora_rank) == (
        7168,
        128,
        1536,
        512,
    )
    assert (block.moe_intermediate_size, block.n_routed_experts, block.num_experts_per_tok) == (2048, 32, 8)
    # 187M weights of attention, 9 experts of 44M and a router, two FLOPs each; scores and values at 2048 others
    attention, experts, router = 187_105_280, 9 * 3 * 7168 * 2048, 32 * 7168
    by_hand = 2 * (attention + experts + router) + 2 * 128 * (192 + 128) * 2048
    assert forward_flops(block, 4096).moe_block == by_hand


def test_figures_are_those_of_the_median_step():
    subject = Subject("by hand", parameters=1, tokens=1000, flops=4e12, steps={})
    found = figure(subject, [0.5, 0.01, 9.0], memory=3e9, peak=80e12)
    assert (found.milliseconds, found.tokens_per_second, found.tflops, found.mfu, found.peak_gb) == (
        500,
        2000,
        8,
        0.1,
        3,
    )
    assert figure(subject, [0.5], memory=None, peak=None).mfu is None
    assert ratio_of({"ours": [1.0, 2.0, 4.0], "transformers": [2.0, 3.0, 16.0]}) == 2.0
    assert ratio_of({"ours": [1.0]}) is None
