"""TFLOP/s and MFU of our DeepSeek-V3 on one GPU, beside transformers' modules of the same size and weights.

    python benchmarks/model_gpu.py                       one block at full width, then the preset "small"; minutes
    python benchmarks/model_gpu.py --only block --experts 64
    python benchmarks/model_gpu.py --json gpu.json
    python benchmarks/model_gpu.py --device cpu --tiny   all of this code in seconds, for its figures nobody asks

block    one layer of the 671B model, hidden 7168, 128 heads, latents of 1536 and 512, with as many routed experts as
         fit (32, of which a token uses 8, as in the real one): forward and backward of one sequence
small    100M parameters, loss and all: forward and backward. Without multi-token prediction and balance loss, which
         transformers cannot train

bfloat16, no recomputation, no optimizer. Steps of both alternate; CUDA events, medians. FLOPs are those of
``deepseek_v3.count``: matrix products, causal attention counted by half, backward twice the forward; both are divided
by the same number. MFU is of the dense peak on the data sheet.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dualpipe import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.block import MoEBlock
from lightning_dualpipe.deepseek_v3.count import forward_flops, training_flops
from lightning_dualpipe.deepseek_v3.hf_config import config_to_hf
from lightning_dualpipe.deepseek_v3.init import initialize
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.rope import Rotary
from lightning_dualpipe.metrics.throughput import peak_flops

DTYPE = torch.bfloat16
WARM_UP = 3  # steps that load kernels and fill the allocator


@dataclass(frozen=True)
class Subject:
    """What is measured: forward and backward of the same thing by each implementation."""

    name: str
    parameters: int
    tokens: int
    flops: float  # of one step
    steps: Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Figure:
    """Of one implementation."""

    milliseconds: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    peak_gb: float | None


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this measures a CUDA device and torch sees none here; --device cpu --tiny only runs the code")
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else peak_flops(device, DTYPE)
    result: dict[str, Any] = {"settings": vars(arguments), "peak_tflops": peak and peak / 1e12, "where": where(device)}
    print(result["where"], f"peak {peak / 1e12:,.0f} TFLOP/s" if peak else "peak unknown: no MFU", sep="; ")
    builders = {"block": block_subject, "small": model_subject}
    for name in arguments.only or builders:
        subject = builders[name](arguments, device)
        seconds, memory = measure(subject.steps, arguments.steps, device)
        figures = {each: figure(subject, seconds[each], memory[each], peak) for each in subject.steps}
        ratio = ratio_of(seconds)
        print(table(subject, figures, ratio))
        described = {"parameters": subject.parameters, "tokens": subject.tokens, "flops": subject.flops}
        result[name] = {**described, "ratio": ratio, **{each: asdict(found) for each, found in figures.items()}}
        del subject  # before the next one takes memory
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for trying the code")
    parser.add_argument("--only", choices=("block", "small"), action="append")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of small")
    parser.add_argument("--experts", type=int, default=32, help="routed experts of the block")
    parser.add_argument("--their-experts", choices=("grouped_mm", "batched_mm", "eager"), default="grouped_mm")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="bf16, dense; where the device is not known")
    parser.add_argument("--json")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.sequence_length, arguments.batch_size, arguments.steps = 32, 2, 2
    return arguments


def configs(*, tiny: bool, experts: int) -> dict[str, DeepSeekV3Config]:
    alone = {"num_nextn_predict_layers": 0, "aux_loss_alpha": 0.0}
    if tiny:
        tiny_one = DeepSeekV3Config.from_preset("tiny", **alone, num_hidden_layers=2)
        return {"block": tiny_one, "small": tiny_one}
    return {
        "block": DeepSeekV3Config.from_preset(
            "671b", **alone, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=experts, rope_scaling=None
        ),
        "small": DeepSeekV3Config.from_preset("small", **alone),
    }


# ---- what is measured -------------------------------------------------------------------------


def block_subject(arguments: argparse.Namespace, device: torch.device) -> Subject:
    config = configs(tiny=arguments.tiny, experts=arguments.experts)["block"]
    shape = (1, arguments.sequence_length, config.hidden_size)
    x, grad = (torch.randn(shape, device=device, dtype=DTYPE) for _ in range(2))
    ours = our_block(config, device)

    def our_forward(h: Tensor) -> Tensor:
        return ours(h, h.new_zeros(1, dtype=torch.float32))[0]

    steps = {"ours": partial(block_step, ours, our_forward, x, grad)}
    if compares(arguments):
        theirs, their_forward = their_block(config, arguments, x)
        copy_weights(ours, theirs)
        steps["transformers"] = partial(block_step, theirs, their_forward, x, grad)
    tokens = arguments.sequence_length
    flops = 3 * forward_flops(config, arguments.sequence_length).moe_block * tokens
    return Subject(f"block of {config.n_routed_experts} experts", size(ours), tokens, flops, steps)


def our_block(config: DeepSeekV3Config, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        block = MoEBlock(config, Rotary(config))
    block.to(DTYPE).to_empty(device=device)
    initialize(block, seed=0, std=config.initializer_range)
    return block


def their_block(
    config: DeepSeekV3Config, arguments: argparse.Namespace, x: Tensor
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    settings = their_config(config, arguments)
    with torch.device(x.device):
        layer = theirs.DeepseekV3DecoderLayer(settings, layer_idx=config.first_k_dense_replace).to(DTYPE).train()
        rotary = theirs.DeepseekV3RotaryEmbedding(settings)
    positions = rotary(x, torch.arange(x.shape[1], device=x.device).unsqueeze(0))

    def forward(h: Tensor) -> Tensor:
        out = layer(h, position_embeddings=positions)
        return out[0] if isinstance(out, tuple) else out

    return layer, forward


def block_step(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    module.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()  # a block in a model passes a gradient on
    out = forward(leaf)
    out.backward(grad)
    return out.detach()


def model_subject(arguments: argparse.Namespace, device: torch.device) -> Subject:
    config = configs(tiny=arguments.tiny, experts=arguments.experts)["small"]
    with torch.device(device):
        ours = Transformer(config).to(DTYPE)
    tokens = torch.randint(config.vocab_size, (arguments.batch_size, arguments.sequence_length + 1), device=device)
    steps = {"ours": partial(model_step, ours, our_loss, tokens)}
    if compares(arguments):
        theirs = their_model(config, arguments, device)
        copy_weights(ours, theirs, rename=their_name)
        steps["transformers"] = partial(model_step, theirs, their_loss, tokens)
    count = arguments.batch_size * arguments.sequence_length
    flops = training_flops(config, arguments.sequence_length, mtp=False) * count
    return Subject("small, end to end", size(ours), count, flops, steps)


def their_model(config: DeepSeekV3Config, arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    from transformers import DeepseekV3ForCausalLM

    with torch.device(device):
        return DeepseekV3ForCausalLM(their_config(config, arguments)).to(DTYPE).train()


def model_step(model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor], tokens: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, tokens)
    loss.backward()
    return loss.detach()


def our_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})["loss"]


def their_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def compares(arguments: argparse.Namespace) -> bool:
    return not arguments.without_transformers and find_spec("transformers") is not None


def their_config(config: DeepSeekV3Config, arguments: argparse.Namespace) -> Any:
    import transformers

    settings = {name: value for name, value in config_to_hf(config).items() if name != "architectures"}
    implementations = {"attn_implementation": "sdpa", "experts_implementation": arguments.their_experts}
    return transformers.DeepseekV3Config(**settings, **implementations)


def their_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}".replace("model.blocks.", "model.layers.")


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: nn.Module, rename: Callable[[str], str] = str) -> None:
    """The same tokens then go to the same experts. Raises where the modules differ."""
    assert size(ours) == size(theirs), f"the modules differ: {size(ours):,} and {size(theirs):,} parameters"
    theirs.load_state_dict({rename(name): tensor for name, tensor in ours.state_dict().items()})


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- how --------------------------------------------------------------------------------------


def measure(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds of each step, and the most bytes that were allocated during one."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, float | None] = dict.fromkeys(steps)
    for index in range(WARM_UP + repeats):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = timed(step, device)
            if index >= WARM_UP:
                seconds[name].append(taken)
                if device.type == "cuda":
                    memory[name] = max(memory[name] or 0.0, torch.cuda.max_memory_allocated(device))
    return seconds, memory


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def figure(subject: Subject, seconds: Sequence[float], memory: float | None, peak: float | None) -> Figure:
    median = statistics.median(seconds)
    rate = subject.flops / median
    return Figure(
        milliseconds=median * 1e3,
        tokens_per_second=subject.tokens / median,
        tflops=rate / 1e12,
        mfu=rate / peak if peak else None,
        peak_gb=None if memory is None else memory / 1e9,
    )


def ratio_of(seconds: Mapping[str, Sequence[float]]) -> float | None:
    """How many times as fast ours is: the median over pairs of neighbouring steps."""
    if "transformers" not in seconds:
        return None
    return statistics.median(b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True))


def table(subject: Subject, figures: Mapping[str, Figure], ratio: float | None) -> str:
    lines = [
        f"\n{subject.name}: {subject.parameters:,} parameters, {subject.tokens:,} tokens, "
        f"{subject.flops / 1e12:,.3g} TFLOP forward and backward",
        f"{'':14}{'ms':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'peak GB, both held':>20}",
    ]
    for name, each in figures.items():
        mfu = "-" if each.mfu is None else f"{each.mfu:.1%}"
        memory = "-" if each.peak_gb is None else f"{each.peak_gb:.1f}"
        lines.append(
            f"{name:14}{each.milliseconds:>10.2f}{each.tokens_per_second:>12,.0f}{each.tflops:>10.4g}{mfu:>8}{memory:>20}"
        )
    lines.append("transformers is left out" if ratio is None else f"ours is {ratio:.2f} x as fast, pair by pair")
    return "\n".join(lines)


def where(device: torch.device) -> str:
    import lightning

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = [
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"Lightning {lightning.__version__}",
    ]
    if find_spec("transformers") is not None:
        import transformers

        versions.append(f"transformers {transformers.__version__}")
    return ", ".join([name, *versions])


if __name__ == "__main__":
    main()
