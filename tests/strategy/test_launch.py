"""Every way to start a run gives the losses of a single process; one process alone is a run too.

``python -m`` is used where a rank is killed (``test_failures``), so that one start serves both.
"""

import os
import socket
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dualpipe import DualPipeStrategy
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.strategy.parting import wait_for_threads_at_exit
from tests.ranks import run_ranks
from tests.strategy import program
from tests.strategy.faults import STEP
from tests.strategy.programs import SCRIPT, Ended, Program, run_together
from tests.strategy.runs import QUIET, SHAPE, Run, build_module, pretend_torchrun

FOUR = ("--strategy", '{"pipeline_parallel_size": 4}')
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.mark.slow
def test_every_way_to_start_a_run_gives_the_losses_of_a_single_process(tmp_path):
    expected = program.train(["--strategy", "null", "--devices", "1"])
    assert expected[-1] < expected[0]

    ended = run_together(
        {
            "console script": Program([[str(console_script(tmp_path)), "--devices", "2"]]),
            "torchrun": Program([[*TORCHRUN, "--standalone", "--nproc-per-node=2", SCRIPT[1], "--devices=2"]]),
            "torchrun on two nodes": two_nodes(free_port()),
            "SLURM, requeued": slurm(tmp_path),
        },
        tmp_path,
    )

    for way, each in ended.items():
        assert set(each.codes) == {0}, f"{way}: {each.error}"
        torch.testing.assert_close(each.losses, expected, rtol=0, atol=1e-9, msg=lambda text, way=way: f"{way}: {text}")
        assert each.left_behind == [], way
    check_requeued(ended["SLURM, requeued"])


def console_script(folder: Path) -> Path:
    """As pip writes it for an entry point."""
    path = folder / "train-it"
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom tests.strategy.program import main\nsys.exit(main())\n")
    path.chmod(0o755)
    return path


def two_nodes(port: int) -> Program:
    nodes = ("--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}")
    script = (SCRIPT[1], "--devices=2", "--num-nodes=2", *FOUR)
    return Program([[*TORCHRUN, *nodes, f"--node-rank={node}", *script] for node in range(2)])


def slurm(folder: Path) -> Program:
    """``srun`` with four tasks on one node; one of them is told in the middle of a batch that time is nearly over."""
    scontrol = folder / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$*" >> {folder}/requeued\n')
    scontrol.chmod(0o755)
    job = {
        "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(700_000 + free_port(range(15_000, 25_000)) - 15_000),  # Lightning makes its port from it
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NODEID": "0",
    }
    tasks = [{**job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(4)]
    fault = {"place": "training_step", "rank": 2, "what": "be_requeued"}
    return Program([[*SCRIPT, "--devices=4", *FOUR]] * 4, fault, environments=tasks)


def check_requeued(ended: Ended) -> None:
    """When the batch was over, and once; the job itself went on until its end."""
    (command,) = (ended.folder.parent / "requeued").read_text().splitlines()
    assert command.split()[:1] == ["requeue"]
    (saved,) = ended.folder.glob("hpc_ckpt_*.ckpt")
    checkpoint = torch.load(saved)
    assert checkpoint["global_step"] == STEP + 1
    names = program.LanguageModel(width=8, depth=6, heads=2).state_dict()
    assert checkpoint["state_dict"].keys() == names.keys()  # of all four ranks


def free_port(ports: range = range(1)) -> int:
    """One of ``ports``; any, where the only one is 0."""
    for port in ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError(f"all of {ports} are taken")


# ---- one process ----------------------------------------------------------------------------------


def loader() -> DataLoader:
    return DataLoader(program.Tokens(), batch_size=program.BATCH_SIZE)


def trainer(strategy: L.pytorch.strategies.Strategy | str, **options: object) -> L.Trainer:
    return L.Trainer(strategy=strategy, accelerator="cpu", max_steps=4, **{**QUIET, "limit_val_batches": 2}, **options)


def test_one_device_needs_no_launch_and_no_pipeline_and_serves_many_trainers():
    expected = program.train(["--strategy", "null", "--devices", "1"])
    assert program.train(["--strategy", "{}", "--devices", "1"]) == expected
    assert not torch.distributed.is_initialized()

    L.seed_everything(1, verbose=False)
    module = program.LanguageModel(width=8, depth=6, heads=2)
    first = trainer("dualpipe", devices=1)
    first.fit(module, loader(), loader())
    (found,) = first.validate(module, loader(), verbose=False)
    again = trainer("dualpipev", devices=1)  # with one rank, no layout differs from another
    assert again.validate(module, loader(), verbose=False) == [found]
    again.fit(module, loader())
    assert trainer("auto", devices=1).validate(module, loader(), verbose=False)[0] != found


# ---- several trainers in a program of several processes --------------------------------------------


@pytest.mark.parametrize(
    "layout", [{"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 1, "expert_parallel_size": 2}]
)
def test_a_second_trainer_with_the_same_layout_goes_on_and_one_with_another_is_refused(layout):
    run_ranks(2, use_several_trainers, layout, timeout=120)


def use_several_trainers(rank: int, layout: dict[str, int]) -> None:
    pretend_torchrun(rank, 2)
    module = build_module(Run())
    trainer(DualPipeStrategy(**layout), devices=2).fit(module, loader())
    assert wait_for_threads_at_exit.cache_info().currsize == 1
    (found,) = trainer(DualPipeStrategy(**layout), devices=2).validate(module, loader(), verbose=False)
    second = trainer(DualPipeStrategy(**layout), devices=2)
    assert second.validate(module, loader(), verbose=False) == [found]
    second.fit(module, loader())
    if "expert_parallel_size" in layout:
        assert {block.mlp.num_local_experts for block in module.model.blocks[3:]} == {SHAPE["n_routed_experts"] // 2}
    (later,) = second.validate(module, loader(), verbose=False)
    assert later != found

    size = layout["pipeline_parallel_size"]
    other = trainer(DualPipeStrategy(pipeline_parallel_size=3 - size), devices=2)
    with pytest.raises(
        ConfigurationError, match=rf"was cut .*pipeline_parallel_size={size}, .*this one needs .*={3 - size}"
    ):
        other.validate(module, loader(), verbose=False)
    os.environ["WORLD_SIZE"] = "1"
    with pytest.raises(ConfigurationError, match="started for 2 processes"):
        trainer(DualPipeStrategy(), devices=1)
