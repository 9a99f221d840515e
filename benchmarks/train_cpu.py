"""Training with expert parallelism between two hosts over a slow link, with and without overlap, in one run.

    sudo python benchmarks/train_cpu.py                          # 200 Mbit/s; one rank on each host; about 3 minutes
    sudo python benchmarks/train_cpu.py --rate 100mbit --json train.json
    sudo python benchmarks/train_cpu.py --pipeline 2             # two ranks on each host, a DualPipe

The hosts are two network namespaces of this machine (iproute2, veth) and the link is shaped by ``tc``'s
token bucket, so that expert traffic really takes its time, and the kernel keeps it going while ranks
compute. The model is a DeepSeek-V3 with everything on, trained on real text by a Trainer; nothing is
emulated. Two trainings that differ in ``DualPipeStrategy(overlap=...)`` alone take turns; each counts the
tokens of its steps but the first two. Ranks of one pipeline are on one host, so that only experts'
tokens and the sums of gradients cross.

Linux and root, for the namespaces; they are gone when it ends.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ADDRESSES = ("10.213.7.1", "10.213.7.2")
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 6,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "num_nextn_predict_layers": 1,
}
SEQUENCE, SEQUENCES_PER_MICROBATCH = 256, 1
WARM_UP = 2  # steps that are not counted


# ---- two hosts ----------------------------------------------------------------------------------


@contextmanager
def two_hosts(rate: str) -> Iterator[list[tuple[str, str]]]:
    """(namespace, its network interface) of each, connected at ``rate`` in both directions."""
    names = [f"ldp{os.getpid()}{letter}" for letter in "ab"]
    links = [f"v{name}"[-15:] for name in names]
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            run("ip", "link", "set", link, "netns", name)
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                run("ip", "-n", name, "link", "set", device, "up")
            shape = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", link, *shape)
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def start_ranks(
    hosts: Sequence[tuple[str, str]], options: argparse.Namespace, results: str
) -> list[subprocess.Popen[bytes]]:
    """As torchrun would, with the ranks of one pipeline on one host."""
    world = len(hosts) * options.pipeline
    ranks = []
    for rank in range(world):
        node, place = rank % len(hosts), rank // len(hosts)  # rank = place in the pipeline * data ranks + data rank
        namespace, link = hosts[node]
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(place),
            "GROUP_RANK": str(node),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(options.pipeline),
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29555",
            "TORCHELASTIC_RUN_ID": "benchmark",
            "GLOO_SOCKET_IFNAME": link,
            "OMP_NUM_THREADS": "1",
        }
        arguments = [sys.executable, __file__, "--rank-of", results, *sys.argv[1:]]
        ranks.append(subprocess.Popen(["ip", "netns", "exec", namespace, *arguments], env=environment))
    return ranks


# ---- one rank -----------------------------------------------------------------------------------


def train(options: argparse.Namespace, results: str) -> None:
    import lightning as L
    import torch
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lightning_dualpipe import DeepSeekV3, DualPipeStrategy, TextDataModule

    torch.set_num_threads(1)

    class Timer(L.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.ends.append(time.perf_counter())
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def fit(overlap: bool) -> tuple[float, list[float]]:
        L.seed_everything(0, verbose=False)
        timer = Timer()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=options.pipeline,
            num_nodes=2,
            strategy=DualPipeStrategy(
                pipeline_parallel_size=options.pipeline,
                expert_parallel_size=2,
                num_microbatches=options.microbatches,
                overlap=overlap,
            ),
            max_steps=WARM_UP + options.steps,
            gradient_clip_val=1.0,
            callbacks=[timer],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = DeepSeekV3("tiny", SHAPE, warmup_steps=10)  # type: ignore[arg-type]
        batch = options.microbatches * SEQUENCES_PER_MICROBATCH
        trainer.fit(module, TextDataModule(sequence_length=SEQUENCE, batch_size=batch))
        seconds = (timer.ends[-1] - timer.ends[WARM_UP - 1]) / options.steps
        return 2 * batch * SEQUENCE / seconds, timer.losses

    rates: dict[str, list[float]] = {"in order": [], "overlapped": []}
    losses: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        for name in list(rates)[:: 1 if repeat % 2 == 0 else -1]:
            rate, losses[name] = fit(overlap=name == "overlapped")
            rates[name].append(rate)
            if rank_zero_only.rank == 0:
                print(f"repeat {repeat + 1} of {options.repeats}, {name}: {rate:,.0f} tokens/s", flush=True)
    if rank_zero_only.rank == 0:
        Path(results).write_text(json.dumps({"tokens_per_second": rates, "losses": losses}))


# ---- reporting ----------------------------------------------------------------------------------


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    rates, losses = found["tokens_per_second"], found["losses"]
    ratios = [b / a for a, b in zip(rates["in order"], rates["overlapped"], strict=True)]
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    print("\n| | best tokens/s | median tokens/s |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {max(values):,.0f} | {median(values):,.0f} |")
    print(f"\noverlapped / in order: {median(ratios):.2f} (least {min(ratios):.2f}, most {max(ratios):.2f})")
    print(f"losses of the two trainings differ by {apart:.1e} at most")
    about = {
        "pipeline": options.pipeline,
        "experts over": 2,
        "microbatches": options.microbatches,
        "link": options.rate,
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"about": about, **found}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="200mbit", help="of the link, as tc writes it")
    parser.add_argument("--pipeline", type=int, default=1, help="ranks on each host")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="that are counted, of each training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single measurement")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        train(options, options.rank_of)
        return
    if os.geteuid() != 0:
        sys.exit("train_cpu.py makes network namespaces, for which it must be run as root")
    with tempfile.TemporaryDirectory() as folder, two_hosts(options.rate) as hosts:
        ranks = start_ranks(hosts, options, f"{folder}/results.json")
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            sys.exit(f"ranks ended with {codes}")
        report(json.loads(Path(folder, "results.json").read_text()), options)


if __name__ == "__main__":
    main()
