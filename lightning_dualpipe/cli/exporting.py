"""``lightning-dualpipe export``: a Hugging Face directory of what a training left behind.

lightning-dualpipe export last.ckpt served/
lightning-dualpipe export step=1000.ckpt served/ --dtype float8_block --processes 8
"""

import argparse
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_dualpipe.cli.tokenizer import named_tokenizer
from lightning_dualpipe.cli.trained import Trained, open_trained
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_plan import PlannedFile, export_plan
from lightning_dualpipe.deepseek_v3.hf_stream import write_file
from lightning_dualpipe.deepseek_v3.hf_tokenizer import largest_token_id, served_tokenizer_files
from lightning_dualpipe.deepseek_v3.hf_writer import FileDtype, documents, warn_of_misreading
from lightning_dualpipe.deepseek_v3.safetensors_files import ModelDirectory
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["export", "export_checkpoint"]


def export(args: Sequence[str]) -> None:
    """
    Raises:
        CheckpointError: a file or a directory that is no checkpoint, or not as it was written.
        ConfigurationError: what else ``export_checkpoint`` refuses.
    """
    asked = _parser().parse_args(args)
    plan = export_checkpoint(
        asked.checkpoint,
        asked.directory,
        dtype=asked.dtype,
        tokenizer=asked.tokenizer,
        eos_token=asked.eos_token,
        max_shard_size=asked.shard_size,
        processes=asked.processes,
        overwrite=asked.overwrite,
    )
    size, tensors = sum(file.size for file in plan), sum(len(file.tensors) for file in plan)
    files = f"{len(plan)} file{'s' if len(plan) > 1 else ''}"
    sys.stdout.write(f"{asked.directory}: {tensors:,} tensors in {asked.dtype}, {size:,} bytes in {files}\n")
    if not (asked.directory / "tokenizer.json").exists():
        sys.stderr.write(
            "The checkpoint does not say which tokenizer it was trained with, so none was written and servers take "
            "token ids only; give it by --tokenizer (bytes, or a tokenizer.json)\n"
        )


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    dtype: FileDtype = "bfloat16",
    tokenizer: str | Path | None = None,
    eos_token: str | None = None,
    max_shard_size: int | str = "5GB",
    processes: int = 1,
    overwrite: bool = False,
) -> list[PlannedFile]:
    """Write what ``save_pretrained`` of the loaded model would, byte for byte, without loading it.

    Memory of each process: one file, and 256 MiB of weights as they are stored. States of optimizers are not read.

    Args:
        checkpoint: of ``DeepSeekV3``: a file, or a directory of all ranks of any layout.
        tokenizer: ``"bytes"``, or a tokenizer.json. Default: the one that the checkpoint was trained with.
        processes: that share the files out; more than there are files have nothing to do.
        overwrite: replace a model in ``directory``, when the new one is complete.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: a file or a directory that is no checkpoint, or not as it was written.
        ConfigurationError: no checkpoint of ``DeepSeekV3``, a request that cannot work, or a directory that cannot be
            written. What was in it is as before.
    """
    if processes < 1:
        raise ConfigurationError(f"--processes {processes}: at least 1 is needed to write")
    checkpoint, directory = Path(checkpoint), Path(directory)
    trained = open_trained(checkpoint)
    config: DeepSeekV3Config = trained.module.config
    plan = export_plan(config, dtype=dtype, max_shard_size=max_shard_size)
    token_ids, texts = _tokenizer(trained, tokenizer, eos_token)
    with ModelDirectory(directory, overwrite=overwrite) as target:
        tasks = [_Task(file, target.shard(number), dtype) for number, file in enumerate(plan)]
        if processes == 1 or len(plan) == 1:
            _write_files(tasks, trained)
        else:
            _run_shared_out(tasks, checkpoint, min(processes, len(plan)))
        total_size = sum(file.size for file in plan)
        target.publish([list(file.tensors) for file in plan], total_size, documents(config, dtype, token_ids, texts))
    warn_of_misreading(config, dtype, directory)
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-dualpipe export",
        description="Make a Hugging Face directory of a checkpoint, which transformers, vLLM and others load. The "
        "weights go through memory a file at a time.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="of a training of DeepSeekV3: a file, or a directory of all ranks")
    add("directory", type=Path, help="to write; nothing in it looks like a model before all of it is there")
    add("--dtype", choices=get_args(FileDtype), default="bfloat16", help="of the weights (default: %(default)s)")
    add(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json, a folder with one, or 'bytes' (default: the one it was trained with)",
    )
    add("--eos-token", help="the token that ends a text, where that of --tokenizer has an unusual name")
    add("--shard-size", default="5GB", help="most bytes of a file, such as 5GB or 512MiB (default: %(default)s)")
    add("--processes", type=int, default=1, metavar="N", help="that share the files out (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a model in DIRECTORY, when the new one is complete")
    return parser


def _tokenizer(
    trained: Trained, tokenizer: str | Path | None, eos_token: str | None
) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Token ids, and texts of files by name."""
    token_ids, files = dict(trained.module.hparams["token_ids"] or {}), trained.tokenizer_files
    if tokenizer is not None:
        loaded = named_tokenizer(tokenizer, eos_token=eos_token)
        files = loaded.files
        token_ids = {
            "bos_token_id": loaded.bos,
            "eos_token_id": loaded.eos,
            "pad_token_id": getattr(loaded, "pad", None),
        }
    elif eos_token is not None:
        raise ConfigurationError(f"--eos-token {eos_token!r} is for a tokenizer that --tokenizer names")
    vocabulary = trained.module.config.vocab_size
    source = tokenizer or f"the tokenizer.json in {trained.path}"
    largest = largest_token_id(files["tokenizer.json"], source) if "tokenizer.json" in files else -1
    if largest >= vocabulary:
        raise ConfigurationError(
            f"the tokenizer has ids up to {largest}, the model vocab_size={vocabulary}: give the tokenizer that the "
            "model was trained with by --tokenizer"
        )
    return token_ids, served_tokenizer_files(files, token_ids, longest=trained.module.config.max_position_embeddings)


# ---- files, shared out ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    file: PlannedFile
    path: Path
    dtype: FileDtype


def _write_files(tasks: Sequence[_Task], trained: Trained) -> None:
    weights = {name.removeprefix("model."): weight for name, weight in trained.weights.items()}
    for task in tasks:
        write_file(task.file, weights, trained.read, task.path, dtype=task.dtype)


def _run_shared_out(tasks: Sequence[_Task], checkpoint: Path, processes: int) -> None:
    """Files are of one size, so each process gets as many. The first that fails ends the others.

    Raises:
        Exception: what kept it from writing.
    """
    context = get_context("forkserver")
    threads = max(1, (os.cpu_count() or 1) // processes)
    started: dict[Any, BaseProcess] = {}
    try:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, checkpoint, tasks[number::processes], threads)
            started[receiver] = context.Process(target=_write, args=arguments, daemon=True)
            started[receiver].start()
            sender.close()  # so that there is an end of what it has to say when it is gone
        unheard = set(started)
        while unheard:
            for heard in wait(list(unheard)):
                unheard.remove(heard)
                if (problem := _last_words(heard)) is not None:
                    raise problem
    finally:
        for process in started.values():
            if process.pid is not None:
                process.terminate()  # has written all, or for nothing
                process.join()


def _last_words(receiver: Any) -> Exception | None:
    try:
        problem: Exception | None = receiver.recv()
    except (EOFError, OSError):
        return ConfigurationError(
            "a process of the export was killed, perhaps because memory ran out: each needs room for one file and 256 "
            "MiB; choose a smaller --shard-size, or fewer --processes"
        )
    return problem


def _write(sender: Connection, checkpoint: Path, tasks: Sequence[_Task], threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    problem: Exception | None = None
    try:
        _write_files(tasks, open_trained(checkpoint))
    except Exception as error:
        problem = error
        problem.__cause__ = None  # for the way to another process
    sender.send(problem)


def _end_with_parent() -> None:
    """Nobody is left to take what is written."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
