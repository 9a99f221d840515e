"""``lightning-dualpipe generate``: continue a text with a trained model.

lightning-dualpipe generate --model exported/ --prompt "import os" --speculate 2 --stream
lightning-dualpipe generate --checkpoint last.ckpt --prompt-file prompts.txt --temperature 0.8 --top-p 0.95
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_dualpipe.cli.tokenizer import tokenizer_of
from lightning_dualpipe.cli.trained import open_trained
from lightning_dualpipe.data.tokenizers import Tokenizer
from lightning_dualpipe.deepseek_v3.generation.decode import Generation
from lightning_dualpipe.deepseek_v3.module import DeepSeekV3
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["generate"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_ESCAPED = re.compile(r"\\([nt\\])")


def generate(args: Sequence[str]) -> None:
    """
    Raises:
        CheckpointError: a checkpoint that is not whole, or would run code.
        ConfigurationError: files that are missing or no model, or what ``DeepSeekV3.generate`` refuses.
        MissingPackageError: a tokenizer.json, and the package ``tokenizers`` is not there.
    """
    asked = _parser().parse_args(args)
    prompts = _prompts(asked)
    module = _module(asked)
    tokenizer = tokenizer_of(module, asked.model or asked.checkpoint, named=asked.tokenizer, eos_token=asked.eos_token)
    stops = [_ESCAPED.sub(lambda found: _ESCAPES[found[1]], stop) for stop in asked.stop]
    stream = module.stream(
        [_ids(tokenizer, prompt, bos=asked.bos) for prompt in prompts],
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=[] if asked.ignore_eos else None,
        speculate=asked.speculate,
        prefill_chunk=asked.prefill_chunk,
        seed=asked.seed,
        stop_when=_end_of_text(tokenizer, stops) if stops else None,
    )
    began = time.perf_counter()
    written = ""
    for _ in stream:
        if asked.stream:
            written = _write_more(_text(tokenizer, stream.generation.tokens[0], stops, whole=False), written)
    seconds = time.perf_counter() - began
    texts = [_text(tokenizer, tokens, stops) for tokens in stream.generation.tokens]
    if asked.json:
        sys.stdout.write(_json(prompts, texts, stream.generation))
    elif asked.stream:
        _write_more(texts[0], written)
        sys.stdout.write("\n")
    else:
        sys.stdout.write("".join(f"{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True)))
    if asked.statistics:
        sys.stderr.write(_summary(stream.generation, seconds))


# ---- what is asked --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-dualpipe generate",
        description="Continue a text, or each line of a file, with a trained model.",
        epilog="Drafts (--speculate) change the time that is taken, not what is written; docs/generation.md.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a Hugging Face directory, as save_pretrained writes it")
    source.add_argument(
        "--checkpoint", type=Path, metavar="LAST.ckpt", help="a checkpoint of a training, a file or a directory"
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", action="append", help="the text to continue; again for more texts in one batch")
    text.add_argument("--prompt-file", type=Path, help="one text to continue, or with --lines one in each line")
    add("--lines", action="store_true", help="each line of --prompt-file is a prompt of its own")
    add(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json, a folder with one, or 'bytes' (default: the one the model was trained with)",
    )
    add("--eos-token", help="the token that ends a text, where the tokenizer's has an unusual name")
    add("--no-bos", dest="bos", action="store_false", help="do not begin with the token that begins a document")
    add("--max-new-tokens", type=int, default=128, help="of each text (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: %(default)g)")
    add("--top-p", type=float, default=1.0, help="draw from the likely tokens with this sum (default: %(default)g)")
    add("--top-k", type=int, help="draw from so many of the likely tokens (default: all)")
    add("--seed", type=int, help="of what is drawn (default: another one each time)")
    add("--speculate", type=int, default=0, metavar="N", help="tokens to draft in each round (default: %(default)s)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this; \n is a new line, \t a tab, \\ a backslash, all else itself; may be repeated",
    )
    add("--ignore-eos", action="store_true", help="go on after the token that ends a text")
    add("--prefill-chunk", type=int, default=1024, help="tokens of a prompt read at a time (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--dtype", choices=tuple(_DTYPES), default="float32", help="of weights and cache (default: %(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="write the new text while it comes, without the prompt")
    output.add_argument("--json", action="store_true", help="for programs: a line for each text")
    add("--statistics", action="store_true", help="tokens per second and accepted drafts, on the error output")
    return parser


def _prompts(asked: argparse.Namespace) -> list[str]:
    if asked.lines and asked.prompt_file is None:
        raise ConfigurationError("--lines has no effect without --prompt-file: give one, or --prompt several times")
    prompts: list[str] = asked.prompt or []
    if asked.prompt_file is not None:
        try:
            content = asked.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"--prompt-file {asked.prompt_file} cannot be read as UTF-8 text: {error}"
            ) from None
        prompts = [line for line in content.splitlines() if line] if asked.lines else [content]
    if not prompts or not all(prompts):
        source = "--prompt" if asked.prompt_file is None else f"--prompt-file {asked.prompt_file}"
        raise ConfigurationError(f"{source} is empty; a model continues a text of at least one character")
    if asked.stream and len(prompts) > 1:
        raise ConfigurationError(
            f"--stream writes one text, and there are {len(prompts)} prompts: leave it out for them"
        )
    for option, texts in (("--prompt", asked.prompt or []), ("--stop", asked.stop)):
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ConfigurationError(f"{option} {text!r} is not UTF-8: give text, or set the locale to a UTF-8 one")
    if not all(asked.stop):
        raise ConfigurationError("--stop '' would end every text at once; leave it out")
    return prompts


def _module(asked: argparse.Namespace) -> DeepSeekV3:
    device = _device(asked.device)
    if asked.model is not None:
        with torch.device("cpu"):
            module = DeepSeekV3.from_pretrained(asked.model)
    else:
        module = open_trained(asked.checkpoint).filled()
    return module.to(device=device, dtype=_DTYPES[asked.dtype]).eval()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"--device {name} cannot be used: {reason}; take cpu, or leave it out") from None
    return device


# ---- texts and tokens -----------------------------------------------------------------------------


def _ids(tokenizer: Tokenizer, text: str, *, bos: bool) -> list[int]:
    ids: list[int] = tokenizer.encode([text])[0].tolist()
    return [tokenizer.bos, *ids] if bos and tokenizer.bos is not None else ids


def _end_of_text(tokenizer: Tokenizer, stops: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """Looks at the last tokens only: each but special ones stands for a byte or more."""
    longest = max(len(stop.encode()) for stop in stops) + 8

    def ends(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(tokens[-longest:])
        return any(stop in text for stop in stops)

    return ends


def _text(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str], *, whole: bool = True) -> str:
    """Up to the first stop; of a text that goes on, without what may be half of a character or of a stop."""
    text = tokenizer.decode(tokens)
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    if ends:
        return text[: min(ends)]
    if not whole:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        beginnings = [stop[:size] for stop in stops for size in range(1, len(stop))]
        held_back = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        text = text[: len(text) - held_back]
    return text


def _write_more(text: str, written: str) -> str:
    sys.stdout.write(text[len(written) :])
    sys.stdout.flush()
    return text if len(text) > len(written) else written


# ---- what is told ---------------------------------------------------------------------------------


def _json(prompts: Sequence[str], texts: Sequence[str], generation: Generation) -> str:
    lines: list[dict[str, Any]] = [
        {"prompt": prompt, "text": text, "tokens": tokens, "finish_reason": reason}
        for prompt, text, tokens, reason in zip(
            prompts, texts, generation.tokens, generation.finish_reasons, strict=True
        )
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _summary(generation: Generation, seconds: float) -> str:
    counts = generation.statistics
    summary = f"{counts.new_tokens} tokens in {seconds:.1f} s, {counts.new_tokens / seconds:.1f} a second"
    if counts.drafted:
        summary += (
            f"; {counts.accepted} of {counts.drafted} drafts accepted ({counts.acceptance:.0%}), "
            f"{counts.tokens_per_round:.2f} tokens a round"
        )
    return summary + "\n"
