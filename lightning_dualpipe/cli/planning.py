"""``lightning-dualpipe plan``: which layout to train with, before there is a cluster. Standard library.

The exit code is 0 where a layout fits, 1 where none does, and 2 where there is nothing to be planned.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning_dualpipe.cli.model_shape import model_shape
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_config import config_from_hf
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.planner import (
    DEEPSEEK,
    HARDWARE,
    Hardware,
    ModelShape,
    Plan,
    Profile,
    Request,
    hardware_named,
    make_plan,
    plan_json,
    plan_text,
)
from lightning_dualpipe.schedules import SCHEDULES

__all__ = ["plan"]

T = TypeVar("T")


class Step(NamedTuple):
    """What a model is usually trained on at a time."""

    sequences: int
    length: int  # tokens


_STEPS: Mapping[str, Step] = {
    "tiny": Step(8, 256),  # examples/quickstart.yaml
    "small": Step(128, 1024),  # examples/train_small.yaml
    "16b": Step(4608, 4096),  # DeepSeek-V2-Lite, which has its shape: arXiv:2405.04434, appendix B
    "671b": Step(15360, 4096),  # arXiv:2412.19437, section 4.2
}


def plan(args: Sequence[str]) -> int:
    """Print the plan and return the exit code.

    Raises:
        ConfigurationError: names that are not known, sizes that do not divide, or files that cannot be read.
    """
    asked = _parser().parse_args(args)
    if asked.preset is None:
        asked.preset = "tiny" if asked.gpu.lower() == "cpu" else "671b"
    made = make_plan(_request(asked))
    sys.stdout.write(plan_json(made, top=asked.top) if asked.json else plan_text(made, top=asked.top))
    if made.fitting:
        return 0
    sys.stderr.write(f"lightning-dualpipe: error: {_nothing_fits(made, asked)}\n")
    return 1


def _nothing_fits(made: Plan, asked: argparse.Namespace) -> str:
    nearest, gigabytes = made.too_large[0], made.request.hardware.memory / 1e9
    pinned = [f"--{name.replace('_', '-')}" for name in _SIZES if getattr(asked, name) is not None]
    remedies = [
        "give more --gpus or a shorter --sequence-length",
        *(["leave out --no-recompute"] if not asked.recompute else []),
        *([f"let the planner choose {', '.join(pinned)}"] if pinned else []),
    ]
    return (
        f"nothing fits: {made.request.hardware.name} has {gigabytes:g} GB, and the smallest of {len(made.too_large)} "
        f"layouts ({nearest.layout}) needs {nearest.memory.total / 1e9:.1f}; {', or '.join(remedies)}"
    )


_SIZES = ("pipeline", "expert", "microbatch_sequences")


def _request(asked: argparse.Namespace) -> Request:
    """Names and files first, and everything that is wrong with them in one error."""
    problems: list[str] = []

    def attempt(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except ConfigurationError as error:
            problems.append(str(error))
            return None

    model: ModelShape | None = attempt(lambda: _model(asked))
    hardware: Hardware | None = attempt(lambda: hardware_named(asked.gpu))
    profile: Profile | None = attempt(lambda: _profile(asked.profile))
    if asked.top < 1:
        problems.append(f"top={asked.top}: at least 1 layout is shown")
    if problems or model is None or hardware is None:
        raise ConfigurationError.of("this cannot be planned", problems)
    return Request(
        model=model,
        hardware=hardware,
        gpus=asked.gpus,
        batch_sequences=_usual(asked).sequences if asked.batch_sequences is None else asked.batch_sequences,
        precision=asked.precision or (profile.precision if profile else "bf16" if hardware.fp8_peak is None else "fp8"),
        schedules=tuple(asked.schedule.split(",")),
        pipeline=asked.pipeline,
        expert=asked.expert,
        microbatch_sequences=asked.microbatch_sequences,
        recompute=asked.recompute,
        overlap=asked.overlap,
        gradient_bytes=asked.gradient_bytes,
        optimizer_bytes=asked.optimizer_bytes,
        profile=profile,
    )


def _model(asked: argparse.Namespace) -> ModelShape:
    if asked.sequence_length is not None and asked.sequence_length < 1:
        raise ConfigurationError(f"sequence_length={asked.sequence_length}: at least 1 token is needed")
    if asked.config is None:
        name, config = asked.preset, DeepSeekV3Config.from_preset(asked.preset)
    else:
        name, config = asked.config.name, config_from_hf(_json(asked.config))
    length = asked.sequence_length or min(_usual(asked).length, config.max_position_embeddings)
    return model_shape(config, name=name, sequence_length=length)


def _usual(asked: argparse.Namespace) -> Step:
    """Nobody knows what a config.json is trained on: it is given the batch of the largest model."""
    return _STEPS["671b" if asked.config is not None else asked.preset]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"config={path} cannot be read as JSON: {error}; give a Hugging Face config.json"
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"config={path} holds no JSON object; give a Hugging Face config.json")
    return content


def _profile(given: str | None) -> Profile | None:
    if given is None:
        return None
    return DEEPSEEK if given == "deepseek" else Profile.read(Path(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-dualpipe plan",
        description="Price every layout of a model on a cluster: time, memory, and what does not fit.",
        epilog="Nothing is measured. docs/planner.md has the formulas, and how far they are from what others measured.",
    )
    add = parser.add_argument
    add("--preset", help="tiny, small, 16b or 671b (default: 671b; of --gpu cpu: tiny)")
    add("--config", type=Path, help="a Hugging Face config.json instead of a preset")
    add("--gpu", default="h800", help=f"{', '.join(HARDWARE)} (default: %(default)s)")
    add("--gpus", type=int, required=True, help="how many of them")
    add("--sequence-length", type=int, help=f"tokens (default: the preset's; {_defaults('length')})")
    add("--batch-sequences", type=int, help=f"of one step (default: the preset's; {_defaults('sequences')})")
    add("--precision", help="fp8 or bf16 (default: fp8 where the hardware has it)")
    add("--schedule", default=",".join(SCHEDULES), help="one or several, with commas between (default: %(default)s)")
    add("--pipeline", type=int, help="pipeline ranks (default: all sizes)")
    add("--expert", type=int, help="expert ranks (default: all sizes)")
    add("--microbatch-sequences", type=int, help="sequences of a microbatch (default: 1, 2, 4 and 8)")
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute norms, MLA's up-projections and SwiGLU again instead of keeping them (default: yes)",
    )
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pairs hide expert traffic (default: yes)",
    )
    add("--gradient-bytes", type=int, default=4, help="of a gradient while it is summed (default: %(default)s)")
    add("--optimizer-bytes", type=int, default=12, help="of states and master weight (default: %(default)s, AdamW)")
    add("--profile", metavar="FILE.json", help="measured layer times; 'deepseek' is their published trace")
    add("--json", action="store_true", help="for programs")
    add("--top", type=int, default=10, help="how many layouts to show (default: %(default)s)")
    return parser


def _defaults(field: str) -> str:
    return ", ".join(f"{preset} {getattr(step, field)}" for preset, step in _STEPS.items())
