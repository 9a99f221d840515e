"""Does the auxiliary-loss-free balancing do what the report says it does (arXiv:2412.19437, sections 2.1.2, 4.5)?

    python benchmarks/balance.py                      both runs of 800 steps, about 3 CPU minutes each
    python benchmarks/balance.py --steps 100 --gamma 0.01 --json balance.json

One small DeepSeek-V3 is trained twice on the same data, with the routers' biases moving (gamma 1e-3)
and with no balancing at all (gamma 0, alpha 0). Then each reads the validation set, where the load of
the experts is counted: MaxVio_global = (largest load - mean load) / mean load. Expected after 800 steps:

    gamma 1e-3     MaxVio_global <= 0.25 in every mixture of experts, that of multi-token prediction included
    no balancing   >= 1.5 in the worst
    both           validation loss equal within 1 %, multi-token prediction agrees in 0.70 of all positions
"""

import argparse
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_dualpipe
from lightning_dualpipe import DeepSeekV3, TextDataModule
from lightning_dualpipe.metrics import max_violation

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 96,
    "intermediate_size": 256,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "num_nextn_predict_layers": 1,
}
SEQUENCE_LENGTH, BATCH_SIZE, LEARNING_RATE = 128, 8, 2e-3
VALIDATION_BATCHES = 64


@dataclass(frozen=True)
class Result:
    gamma: float
    alpha: float
    steps: int
    seed: int
    validation_loss: float  # nats per byte
    mtp_agreement: float
    max_violation: dict[str, float]  # MaxVio_global by router
    cpu_seconds: float

    @property
    def worst(self) -> float:
        return max(self.max_violation.values())


def run(*, gamma: float, alpha: float, steps: int, seed: int = 0, path: str | None = None) -> Result:
    """Train, then count the load over the validation set. ``path``: another corpus than Python's own sources."""
    L.seed_everything(seed, verbose=False)
    overrides = {**SHAPE, "bias_update_speed": gamma, "aux_loss_alpha": alpha}
    module = DeepSeekV3(
        "tiny",
        overrides,  # type: ignore[arg-type]
        learning_rate=LEARNING_RATE,
        learning_rate_schedule="cosine",
        warmup_steps=min(50, steps // 4),
    )
    data = TextDataModule(path, SEQUENCE_LENGTH, batch_size=BATCH_SIZE, seed=seed)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=VALIDATION_BATCHES,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    with expert_load(module) as load:
        trainer.fit(module, data)
    return Result(
        gamma=gamma,
        alpha=alpha,
        steps=steps,
        seed=seed,
        validation_loss=float(trainer.callback_metrics["val_loss"]),
        mtp_agreement=float(trainer.callback_metrics["val_mtp_agreement"]),
        max_violation={name: float(max_violation(counts_E)) for name, counts_E in load.items()},
        cpu_seconds=time.process_time() - start,
    )


@contextmanager
def expert_load(module: DeepSeekV3) -> Iterator[dict[str, Tensor]]:
    """Tokens per expert [E] by router, in forwards of evaluation, summed."""
    load: dict[str, Tensor] = {}
    hooks = []
    for name, router in module.model.routers():

        def count(router: nn.Module, args: Any, out: tuple[Tensor, ...], name: str = name) -> None:
            if not router.training:
                counted_E = out[1].flatten().bincount(minlength=SHAPE["n_routed_experts"])
                load[name] = load.get(name, 0) + counted_E

        hooks.append(router.register_forward_hook(count))
    try:
        yield load
    finally:
        for hook in hooks:
            hook.remove()


def problems(balanced: Result, unbalanced: Result) -> list[str]:
    """What does not come out as the report says, after 800 steps."""
    found = [
        f"MaxVio_global of {name} is {value:.3f} with gamma {balanced.gamma:g}, at most 0.25 expected"
        for name, value in balanced.max_violation.items()
        if value > 0.25
    ]
    if unbalanced.worst < 1.5:
        found.append(f"MaxVio_global without balancing is {unbalanced.worst:.3f}, at least 1.5 expected")
    if balanced.validation_loss > 1.01 * unbalanced.validation_loss:
        found.append(f"balancing costs loss: {balanced.validation_loss:.4f} against {unbalanced.validation_loss:.4f}")
    if balanced.mtp_agreement < 0.70:
        found.append(f"multi-token prediction agrees in {balanced.mtp_agreement:.3f} of all positions, 0.70 expected")
    return found


def versions() -> str:
    return (
        f"lightning-dualpipe {lightning_dualpipe.__version__}, torch {torch.__version__}, lightning {L.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads"
    )


def table(results: Sequence[Result]) -> str:
    routers = list(results[0].max_violation)
    head = f"{'gamma':>8}{'alpha':>8}{'val loss':>10}{'MTP agrees':>12}{'CPU s':>8}   MaxVio_global"
    lines = [f"{head}: {', '.join(name.removesuffix('.mlp.gate') for name in routers)}"]
    for r in results:
        numbers = f"{r.gamma:>8g}{r.alpha:>8g}{r.validation_loss:>10.4f}{r.mtp_agreement:>12.3f}{r.cpu_seconds:>8.0f}"
        lines.append(f"{numbers}   {'  '.join(f'{r.max_violation[name]:.3f}' for name in routers)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--gamma", type=float, default=1e-3, help="of the balanced run")
    parser.add_argument("--alpha", type=float, default=1e-4, help="of the balanced run: sequence-wise balance loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here too")
    asked = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(asked.threads)

    print(versions(), flush=True)
    unbalanced = run(gamma=0.0, alpha=0.0, steps=asked.steps, seed=asked.seed)
    balanced = run(gamma=asked.gamma, alpha=asked.alpha, steps=asked.steps, seed=asked.seed)
    print(f"{asked.steps} steps of {BATCH_SIZE} x {SEQUENCE_LENGTH} bytes, seed {asked.seed}")
    print(table([unbalanced, balanced]))
    found = problems(balanced, unbalanced)
    print("\n".join(found) or "as the report says")
    if asked.json:
        content = {"versions": versions(), "results": [asdict(unbalanced), asdict(balanced)], "problems": found}
        asked.json.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
