"""Training tokens per CPU-second of our DeepSeek-V3 against transformers' DeepseekV3ForCausalLM.

    python benchmarks/model_cpu.py                       alternating steps of both, one thread, about a minute
    python benchmarks/model_cpu.py --profile             also where our time goes
    python benchmarks/model_cpu.py --json model.json

Both models have the same configuration and the same number of parameters, read the same tokens, and
do the same: forward, next-token loss, backward, clipping at 1.0, fused AdamW. Multi-token prediction
and the balance loss, which transformers cannot train, are off; what ours does beyond transformers
(counting tokens, moving the router's bias) is on. The unit is CPU time of the process, which other
processes on the machine change little; steps alternate, so that what they do change hits both.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lightning_dualpipe import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_config import config_to_hf
from lightning_dualpipe.deepseek_v3.model import Transformer

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
    aux_loss_alpha=0.0,
    initializer_range=0.02,
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (arguments.batch_size, arguments.sequence_length + 1))
    ours, theirs = Transformer(CONFIG), build_transformers(arguments.attention)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] == sizes[1], f"the models differ: {sizes} parameters"

    steps = {"ours": training_step(ours, our_loss), "transformers": training_step(theirs, their_loss)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(arguments.steps + 2):
        for name, step in steps.items():
            start = time.process_time()
            step(tokens)
            if index >= 2:  # the first ones allocate
                seconds[name].append(time.process_time() - start)
    result = summary(
        seconds, tokens=arguments.batch_size * arguments.sequence_length, arguments=arguments, size=sizes[0]
    )
    print(table(result))
    if arguments.profile:
        print(where_time_goes(steps["ours"], tokens))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


def build_transformers(attention: str) -> nn.Module:
    settings = {name: value for name, value in config_to_hf(CONFIG, dtype="float32").items() if name != "architectures"}
    config = transformers.DeepseekV3Config(**settings, attn_implementation=attention)
    return transformers.DeepseekV3ForCausalLM(config).train()


def training_step(model: nn.Module, loss_of: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(tokens: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if isinstance(model, Transformer):
            for _, router in model.routers():
                router.update_bias(router.tokens_per_expert, CONFIG.bias_update_speed)

    return step


def our_loss(model: Transformer, tokens: Tensor) -> Tensor:
    means = model({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
    assert isinstance(means, dict)
    return means["loss"]


def their_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def summary(
    seconds: dict[str, list[float]], *, tokens: int, arguments: argparse.Namespace, size: int
) -> dict[str, Any]:
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    best = {name: tokens / min(times) for name, times in seconds.items()}
    pairs = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return {
        "tokens_per_cpu_second": rates,
        "best": best,
        "ratio": statistics.median(pairs),
        "ratio_quartiles": [statistics.quantiles(pairs)[0], statistics.quantiles(pairs)[2]],
        "parameters": size,
        "settings": vars(arguments),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.processor() or platform.machine(),
        },
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':14}{'tokens per CPU-second':>24}{'best':>10}"]
    for name, rate in result["tokens_per_cpu_second"].items():
        lines.append(f"{name:14}{rate:>24,.0f}{result['best'][name]:>10,.0f}")
    low, high = result["ratio_quartiles"]
    lines.append(f"ratio, pair by pair: {result['ratio']:.2f} (quartiles {low:.2f} to {high:.2f}); aim > 1.2")
    lines.append(f"{result['parameters']:,} parameters; {result['versions']}")
    return "\n".join(lines)


def where_time_goes(step: Callable[[Tensor], None], tokens: Tensor) -> str:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(tokens)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)


if __name__ == "__main__":
    sys.exit(main())
