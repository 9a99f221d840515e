"""``examples/train.sbatch`` on a real Slurm of two nodes: when its time is over it saves, is requeued and goes on.

sudo python -m pytest -m hosts -s tests/hosts/test_slurm.py            # some 3 minutes
"""

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lightning_dualpipe.checkpoint.stored import read_whole
from tests.hosts.cluster import PROGRAMS, Cluster, slurm
from tests.hosts.namespaces import two_hosts
from tests.hosts.training import EXAMPLES, environment, losses, write_configuration
from tests.marks import needs_commands, needs_root

STEPS, SIGNAL_AT = 45, 12
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
PATIENCE = 400


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a name short enough for sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def submit(cluster: Cluster, folder: Path, save: str) -> str:
    # every 15 steps: so that what the requeued job goes on from was written because of the signal
    path = write_configuration(folder, steps=STEPS, every=15, timeout=60, save=save, checkpoints="null")
    options = [*SIZE, f"--chdir={folder}"]
    variables = environment(folder, {})
    arguments = ("--config", str(path))
    return cluster.submit(EXAMPLES / "train.sbatch", *arguments, options=options, variables=variables)


def wait(cluster: Cluster, job: str, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        state = cluster.field(job, "JobState")
        if state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") or time.monotonic() > deadline:
            pytest.fail(f"{state}: {Path(cluster.field(job, 'StdOut')).read_text()[-6000:]}")
        if state == "PENDING":  # a requeued job waits for two minutes, unless it has just begun
            with contextlib.suppress(AssertionError):
                cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.2)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    path = next(run.glob(f"**/step={STEPS}.ckpt"))
    weights: dict[str, torch.Tensor] = read_whole(path)["state_dict"]
    return weights


@pytest.mark.hosts
@pytest.mark.timeout(1200)
@needs_root
@needs_commands("ip", "unshare", *PROGRAMS)
def test_a_job_that_is_told_to_end_saves_is_requeued_and_goes_on(folder: Path) -> None:
    with two_hosts(folder) as hosts, slurm(hosts, folder) as cluster:
        whole = submit(cluster, folder, "true")
        wait(cluster, whole, lambda: cluster.field(whole, "JobState") == "COMPLETED")
        expected = losses(folder / "runs" / whole)
        assert list(expected) == list(range(STEPS))

        requeued = submit(cluster, folder, "async")
        run = folder / "runs" / requeued
        wait(cluster, requeued, lambda: max(losses(run), default=0) >= SIGNAL_AT)
        cluster.run("scancel", "--signal=USR1", requeued)
        wait(cluster, requeued, lambda: cluster.field(requeued, "JobState") == "COMPLETED")
        assert cluster.field(requeued, "Restarts") == "1"
        print(f"\n{cluster.run('scontrol', 'show', 'job', requeued).split('TimeLimit')[0]}")

    (saved,) = run.glob("hpc_ckpt_*.ckpt")
    step = read_whole(saved)["global_step"]
    (restored,) = re.findall(r"Restored all states .* at (\S+)", (folder / f"dualpipe-{requeued}.out").read_text())
    # or one that was written later: SLURM takes its time to end a job that is requeued, which goes on meanwhile
    assert read_whole(folder / restored)["global_step"] >= step >= SIGNAL_AT
    found = losses(run)
    assert found == expected, "to the last bit"
    weights, others = final_weights(folder / "runs" / whole), final_weights(run)
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    print(f"job {requeued}, told to end, saved {saved.name} at step {step}, was requeued, went on from {restored},")
    print(f"and has the losses of all {len(found)} steps and the {len(weights)} tensors of job {whole}, bit for bit")
