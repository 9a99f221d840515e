"""Tokens per second of generation: with a cache and without, with drafts and without, on one core.

    python benchmarks/generate.py --checkpoint runs/quickstart/version_0/checkpoints/last.ckpt

Continues texts that were held out from the training (``--corpus`` and ``--data-seed`` as in the run), one at a time,
where drafts help most, and as one batch. The unit is CPU time of the process, which other processes on the machine
change little; ways of generating alternate prompt by prompt, and what counts are the ratios of one run. Texts are
checked to be the same in all ways; in float32 a near tie may differ, and is counted.

The teacher-forced acceptance is over the held-out text itself: how often the draft for the next token but one, made
from the true text, is what the model would choose.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_dualpipe import DeepSeekV3, TextDataModule
from lightning_dualpipe.cli.trained import open_trained
from lightning_dualpipe.deepseek_v3.generation.decode import Generation, Statistics


@dataclass
class Way:
    """One way of generating, and what it took for each prompt."""

    name: str
    run: Callable[[list[list[int]]], Generation]
    seconds: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    counts: list[Statistics] = field(default_factory=list)

    def measure(self, prompts: list[list[int]]) -> None:
        began = time.process_time()
        generation = self.run(prompts)
        self.seconds.append(time.process_time() - began)
        self.texts += generation.tokens
        self.counts.append(generation.statistics)

    def acceptance_at(self, place: int) -> float:
        drafted = sum(count.drafted_at[place] for count in self.counts if place < len(count.drafted_at))
        return sum(count.accepted_at[place] for count in self.counts if place < len(count.accepted_at)) / drafted

    @property
    def tokens_per_round(self) -> float:
        rounds = sum(count.rounds for count in self.counts)
        return 1 + sum(count.accepted for count in self.counts) / rounds


def main() -> None:
    asked = parse()
    torch.set_num_threads(asked.threads)
    module = open_trained(asked.checkpoint).filled() if asked.checkpoint else DeepSeekV3.from_pretrained(asked.model)
    module = module.to(dtype=torch.float64 if asked.float64 else torch.float32).eval()
    held_out = held_out_text(asked)
    prompts = [text[: asked.prompt_tokens] for text in held_out]
    result: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(asked).items()},
        "teacher_forced_acceptance": teacher_forced(module, held_out),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    one_by_one = [without_cache(module, asked), *ways(module, asked, temperature=0.0)]
    for prompt in [prompts[0], *prompts]:  # the first one warms up
        for way in one_by_one:
            way.measure([prompt])
    for way in one_by_one:
        way.seconds, way.texts, way.counts = way.seconds[1:], way.texts[1:], way.counts[1:]
    result["one text at a time, greedy"] = compared(one_by_one, asked.new_tokens)
    for name, temperature in (("one batch, greedy", 0.0), ("one batch, temperature 1", 1.0)):
        together = ways(module, asked, temperature=temperature)
        for _ in range(asked.repeats):
            for way in together:
                way.measure(prompts)
        result[name] = compared(together, asked.new_tokens * len(prompts))
    print(table(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path)
    source.add_argument("--model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--corpus", help="default: the standard library, as TextDataModule's")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--speculate", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=3, help="of a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def held_out_text(asked: argparse.Namespace) -> list[list[int]]:
    data = TextDataModule(asked.corpus, 512, batch_size=asked.prompts, seed=asked.data_seed)
    data.prepare_data()
    data.setup("validate")
    return next(iter(data.val_dataloader()))["input_ids"].tolist()


@torch.no_grad()
def teacher_forced(module: DeepSeekV3, texts: Sequence[list[int]]) -> float:
    tokens = torch.tensor(texts)
    means = module.model({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
    assert isinstance(means, dict)
    return float(means.get("mtp_agreement", torch.tensor(float("nan"))))


def ways(module: DeepSeekV3, asked: argparse.Namespace, *, temperature: float) -> list[Way]:
    def way(speculate: int) -> Way:
        def run(prompts: list[list[int]]) -> Generation:
            return module.generate(
                prompts,
                max_new_tokens=asked.new_tokens,
                temperature=temperature,
                speculate=speculate,
                seed=0,
                stop=[],
            )

        return Way(f"{speculate} drafts" if speculate else "cached", run)

    return [way(0), *map(way, asked.speculate)]


def without_cache(module: DeepSeekV3, asked: argparse.Namespace) -> Way:
    @torch.no_grad()
    def run(prompts: list[list[int]]) -> Generation:
        (tokens,) = prompts
        for _ in range(asked.new_tokens):
            logits = module(torch.tensor([tokens]))
            tokens = [*tokens, int(logits[0, -1].argmax())]
        return Generation([tokens[-asked.new_tokens :]], ["length"], Statistics(rounds=asked.new_tokens - 1))

    return Way("no cache", run)


def compared(measured: Sequence[Way], tokens: int) -> list[dict[str, Any]]:
    base = next(way for way in measured if way.name == "cached")
    return [
        {
            "way": way.name,
            "tokens_per_cpu_second": tokens / statistics.median(way.seconds),
            "ratio_to_cached": statistics.median(a / b for a, b in zip(base.seconds, way.seconds, strict=True)),
            "tokens_per_round": way.tokens_per_round,
            "acceptance_at": [way.acceptance_at(place) for place in range(max(len(c.drafted_at) for c in way.counts))],
            "texts_that_differ": sum(a != b for a, b in zip(base.texts, way.texts, strict=True)),
            "texts": len(way.texts),
        }
        for way in measured
    ]


def table(result: dict[str, Any]) -> str:
    lines = [f"teacher-forced acceptance on held-out text: {result['teacher_forced_acceptance']:.1%}"]
    for name, rows in result.items():
        if not isinstance(rows, list):
            continue
        lines += ["", f"{name:28}{'tokens/CPU-s':>14}{'ratio':>8}{'tokens/round':>14}{'differ':>8}  accepted, by place"]
        for row in rows:
            accepted = " ".join(f"{share:.0%}" for share in row["acceptance_at"])
            differ = f"{row['texts_that_differ']}/{row['texts']}" if "greedy" in name else "-"
            lines.append(
                f"{row['way']:28}{row['tokens_per_cpu_second']:>14.1f}{row['ratio_to_cached']:>8.2f}"
                f"{row['tokens_per_round']:>14.2f}{differ:>8}  {accepted}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
