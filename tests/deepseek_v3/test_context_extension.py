"""The recipe in examples/context_extension: weights stay, positions turn as YaRN says, the rest is the report's."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.count import count_parameters
from lightning_dualpipe.deepseek_v3.rope import frequencies, softmax_scale

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "context_extension"


def settings(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    return found


def model_arguments(name: str) -> dict[str, Any]:
    arguments: dict[str, Any] = settings(name)["model"]["init_args"]
    return arguments


def module(arguments: dict[str, Any], pretrained: Path | None) -> DeepSeekV3:
    return DeepSeekV3(**{**arguments, **({} if pretrained is None else {"pretrained": str(pretrained)})})


@pytest.mark.filterwarnings("ignore:.*was made with other settings")
def test_phases_begin_with_the_weights_before_and_turn_positions_as_yarn_says(tmp_path: Path) -> None:
    base = module(model_arguments("tiny_128"), None)
    base.configure_model()
    with torch.no_grad():
        for name, buffer in base.named_buffers():
            if "bias" in name:  # of routers: as if they had been trained
                buffer.uniform_(-1, 1)
    base.save_pretrained(tmp_path / "128", dtype="float32")
    first = module(model_arguments("tiny_512"), tmp_path / "128")
    first.configure_model()
    first.save_pretrained(tmp_path / "512", dtype="float32")
    second = module(model_arguments("tiny_2048"), tmp_path / "512")
    second.configure_model()

    for later in (first, second):
        for (name, before), (same, after) in zip(base.state_dict().items(), later.state_dict().items(), strict=True):
            assert name == same and torch.equal(before, after), name

    # DeepSeek's own order: pairs 0 to 11 turn between 32 times and once within 128 positions, as rounded outwards
    plain = [10000 ** (-2 * pair / 64) for pair in range(32)]
    ramp = [min(pair / 11, 1.0) for pair in range(32)]
    assert math.ceil(64 * math.log(128 / (2 * math.pi)) / (2 * math.log(10000))) == 11
    expected = [one * (1 - r) + one / 20 * r for one, r in zip(plain, ramp, strict=True)]
    assert frequencies(base.config).tolist() == pytest.approx(plain, rel=1e-15)
    sharper = (0.1 * math.log(20) + 1) ** 2
    for later in (first, second):
        assert frequencies(later.config).tolist() == pytest.approx(expected, rel=1e-15)
        assert softmax_scale(later.config) == pytest.approx(sharper * softmax_scale(base.config), rel=1e-15)
    tokens = torch.arange(300).remainder(256)[None]
    with torch.no_grad():
        assert not torch.allclose(first(tokens), base(tokens), atol=1e-3)
        assert torch.equal(first(tokens), second(tokens))


def test_the_large_ones_are_the_model_that_was_released() -> None:
    first, second = model_arguments("32k"), model_arguments("128k")
    assert (first.pop("pretrained"), second.pop("pretrained")) == ("pretrained-4k/", "pretrained-32k/")
    assert first == second, "as in the report, which keeps YaRN's settings"
    released = DeepSeekV3Config.from_preset("671b")
    extended = DeepSeekV3Config.from_preset("671b", **first["overrides"])
    assert replace(extended, bias_update_speed=1e-3, mtp_loss_weight=0.3) == released
    built = DeepSeekV3(**first, preset="671b")  # on the meta device
    biases = 59 * 256  # of routers, which are no parameters
    assert sum(p.numel() for p in built.parameters()) + biases == count_parameters(released).total_with_mtp
    assert all(parameter.is_meta for parameter in built.parameters())


def test_each_phase_has_the_steps_and_the_tokens_of_the_report() -> None:
    for name, sequences, length in (("32k", 1920, 32768), ("128k", 480, 131072)):
        found = settings(name)
        trainer, data, parallel = (
            found["trainer"],
            found["data"]["init_args"],
            found["trainer"]["strategy"]["init_args"],
        )
        ranks = trainer["devices"] * trainer["num_nodes"] // parallel["pipeline_parallel_size"]
        assert ranks * data["batch_size"] == sequences and data["sequence_length"] == length
        assert data["batch_size"] % parallel["num_microbatches"] == 0 and ranks % parallel["expert_parallel_size"] == 0
        assert trainer["max_steps"] == 1000
        assert found["model"]["init_args"]["learning_rate"] == 7.3e-6
    for name in ("tiny_128", "tiny_512", "tiny_2048"):
        data = settings(name)["data"]["init_args"]
        assert data["batch_size"] * data["sequence_length"] == 4096
