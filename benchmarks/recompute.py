"""What recomputing saves and costs: peak memory and time of a training step, for each setting.

    python benchmarks/recompute.py                  one thread, about a minute
    python benchmarks/recompute.py --json recompute.json

Time is CPU time of the process; steps of the settings alternate, so that what else happens on the
machine hits all of them. Memory is measured in a process of its own for each setting: the peak of its
resident memory within one forward and backward, above what it had before. Beside it stands what
``kept_bytes`` says of the layers; the rest is the head, and what backward needs at a time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lightning_dualpipe import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.activations import kept_bytes
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.recompute import Recompute
from lightning_dualpipe.metrics.memory import peak_memory

SETTINGS: tuple[Recompute, ...] = get_args(Recompute)
CONFIG = DeepSeekV3Config(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    moe_intermediate_size=128,
    num_hidden_layers=8,
    first_k_dense_replace=1,
    num_attention_heads=8,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_position_embeddings=1024,
    num_nextn_predict_layers=0,
    initializer_range=0.02,
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    shape = arguments.batch_size, arguments.sequence_length
    if arguments.alone:
        print(peak_of_a_step(arguments.alone, shape))
        return
    seconds = time_steps(shape, arguments.steps)
    tokens = shape[0] * shape[1]
    result = {
        setting: {
            "seconds": statistics.median(seconds[setting]),
            "ratio": statistics.median(
                mine / none for mine, none in zip(seconds[setting], seconds["none"], strict=True)
            ),
            "peak_mb": alone(setting, shape) / 2**20,
            "kept_mb": tokens * of_all_layers(setting) / 2**20,
        }
        for setting in SETTINGS
    }
    print(table(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), **result}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--alone", choices=SETTINGS, help="only the peak memory of this setting, in bytes")
    parser.add_argument("--json")
    return parser.parse_args()


def time_steps(shape: tuple[int, int], steps: int) -> dict[Recompute, list[float]]:
    tokens = tokens_of(shape)
    models = {setting: Transformer(CONFIG, recompute=setting) for setting in SETTINGS}
    seconds: dict[Recompute, list[float]] = {setting: [] for setting in SETTINGS}
    for index in range(steps + 1):
        for setting, model in models.items():
            start = time.process_time()
            step(model, tokens)
            if index:  # the first one allocates
                seconds[setting].append(time.process_time() - start)
    return seconds


def peak_of_a_step(setting: Recompute, shape: tuple[int, int]) -> int:
    model = Transformer(CONFIG, recompute=setting)
    step(model, tokens_of((1, 2)))  # gradients, tables and threads get their memory
    before = peak_memory(torch.device("cpu"))
    step(model, tokens_of(shape))
    return peak_memory(torch.device("cpu")) - before


def alone(setting: Recompute, shape: tuple[int, int]) -> int:
    sizes = ["--batch-size", str(shape[0]), "--sequence-length", str(shape[1])]
    command = [sys.executable, __file__, "--alone", setting, *sizes]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def step(model: Transformer, tokens: Tensor) -> None:
    means = model({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
    assert isinstance(means, dict)
    means["loss"].backward()


def tokens_of(shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CONFIG.vocab_size, (shape[0], shape[1] + 1), generator=generator)


def of_all_layers(setting: Recompute) -> float:
    """Bytes per token."""
    each, num_dense = kept_bytes(CONFIG, setting, element=4), CONFIG.first_k_dense_replace
    return num_dense * each.dense_block + (CONFIG.num_hidden_layers - num_dense) * each.moe_block


def table(result: dict[Recompute, dict[str, float]]) -> str:
    lines = [f"{'recompute':12}{'CPU-seconds a step':>20}{'ratio':>8}{'peak above idle':>18}{'kept by layers':>16}"]
    for setting, each in result.items():
        lines.append(
            f"{setting:12}{each['seconds']:>20.3f}{each['ratio']:>8.3f}"
            f"{each['peak_mb']:>15.0f} MB{each['kept_mb']:>13.0f} MB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
