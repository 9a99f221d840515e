"""``lightning-dualpipe import``: a Lightning checkpoint of a Hugging Face directory.

lightning-dualpipe import DeepSeek-V3-Base/ base.ckpt
"""

import argparse
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data

from lightning_dualpipe.checkpoint.single_file import written_whole
from lightning_dualpipe.deepseek_v3.hf_names import Part, is_router_bias, parts_of
from lightning_dualpipe.deepseek_v3.hf_reader import load_weights
from lightning_dualpipe.deepseek_v3.hf_tokenizer import read_tokenizer_files
from lightning_dualpipe.deepseek_v3.module import DeepSeekV3
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["import_", "import_pretrained"]

CheckpointDtype = Literal["float32", "bfloat16"]


def import_(args: Sequence[str]) -> None:
    """
    Raises:
        ConfigurationError: what ``import_pretrained`` refuses.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dualpipe import",
        description="Make a Lightning checkpoint of a Hugging Face directory: validate, generate and export take it, "
        "load_from_checkpoint opens it, and fit --ckpt_path begins with it, at step 0 and with a new optimizer. The "
        "weights go through memory a tensor at a time. A run can also begin with the directory itself: "
        "--model.pretrained DIRECTORY.",
    )
    parser.add_argument("directory", type=Path, help="config.json and safetensors files")
    parser.add_argument("checkpoint", type=Path, help="the file to write")
    parser.add_argument(
        "--dtype",
        choices=get_args(CheckpointDtype),
        default="float32",
        help="of the weights; float32 holds those of any directory exactly, FP8 too (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace CHECKPOINT if it exists, by a whole one")
    asked = parser.parse_args(args)
    import_pretrained(asked.directory, asked.checkpoint, dtype=asked.dtype, overwrite=asked.overwrite)
    sys.stdout.write(f"{asked.checkpoint}: {asked.checkpoint.stat().st_size:,} bytes, weights in {asked.dtype}\n")


def import_pretrained(
    directory: str | Path, checkpoint: str | Path, *, dtype: CheckpointDtype = "float32", overwrite: bool = False
) -> None:
    """Write a Lightning checkpoint of weights, configuration, token ids and tokenizer.

    Memory: one tensor; the file is made in its full length first, and filled through a map of it.

    Raises:
        ConfigurationError: ``directory`` is no whole DeepSeek-V3, or the file exists or cannot be written.
    """
    directory, checkpoint = Path(directory), Path(checkpoint)
    if checkpoint.is_dir() or (checkpoint.exists() and not overwrite):
        raise ConfigurationError(f"{checkpoint} exists; give another name, or pass --overwrite to replace a file")
    module = DeepSeekV3(pretrained=directory)
    module.tokenizer_files = read_tokenizer_files(directory)
    with written_whole(checkpoint) as written:
        _reserve(module, written, getattr(torch, dtype))
        with set_default_mmap_options(mmap.MAP_SHARED):
            weights = torch.load(written, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        names = [part.name for part in parts_of(module.model)]
        load_weights([Part(name, weights[f"model.{name}"]) for name in names], directory, module.config)
        del weights


def _reserve(module: DeepSeekV3, path: Path, dtype: torch.dtype) -> None:
    """The checkpoint, with room for weights instead of weights."""
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        rooms: dict[Tensor, Tensor] = {}  # one for weights that are tied
        weights = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            kept = torch.float32 if is_router_bias(name) else dtype
            weights[name] = rooms.setdefault(tensor, torch.empty(tensor.shape, dtype=kept))
        content: dict[str, Any] = {
            "state_dict": weights,
            "hyper_parameters": dict(module.hparams),
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": lightning.__version__,
            # where a run of nothing yet goes on: its loops begin, and its optimizer has no states
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
        }
        module.on_save_checkpoint(content)
        torch.save(content, path)
    with open(path, "r+b") as file:  # a disk that is full says so now, not when a mapped page has no place
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
