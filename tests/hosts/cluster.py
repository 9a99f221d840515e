"""A Slurm cluster of two hosts: its own programs, with its files in a folder.

    with two_hosts(folder) as hosts, slurm(hosts, folder) as cluster:
        job = cluster.submit("train.sbatch", "--config", "train.yaml")

Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.namespaces import Host

__all__ = ["PROGRAMS", "Cluster", "slurm"]

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
# What is left out is what containers lack: control groups, accounting, a mail program.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%h.pid
SlurmdSpoolDir={folder}/spool.%h
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%h.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=10
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class Cluster:
    first: Host
    folder: Path

    def run(self, *command: str, **variables: str) -> str:
        """A program of Slurm's on the first host; its output."""
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **variables}
        done = subprocess.run(
            self.first.command(*command), capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: Sequence[str], variables: Mapping[str, str]) -> str:
        """The number of the job."""
        output = self.run("sbatch", "--parsable", *options, str(script), *arguments, **variables)
        return output.strip().partition(";")[0]

    def field(self, job: str, name: str) -> str:
        """Of ``scontrol show job``, such as JobState."""
        shown = self.run("scontrol", "show", "job", job)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")


@contextmanager
def slurm(hosts: Sequence[Host], folder: Path) -> Iterator[Cluster]:
    """One that is ready for jobs; ``folder`` is its own, with a short name, because a socket lies in it."""
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=4000 State=UNKNOWN" for host in hosts]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(first=hosts[0], folder=folder, nodes="\n".join(nodes)).lstrip()
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munged += [f"--{what}-file={folder}/munge.{what}" for what in ("pid", "log", "seed")]
    daemons = [munged, hosts[0].command("slurmctld", "-D", "-f", f"{folder}/slurm.conf")]
    daemons += [host.command("slurmd", "-D", "-N", host.name, "-f", f"{folder}/slurm.conf") for host in hosts]
    cluster = Cluster(hosts[0], folder)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "daemons.log", "w"))
        for daemon in daemons:
            started = subprocess.Popen(daemon, stdout=log, stderr=log)
            stack.callback(_end, started)
            if daemon is munged:
                _until((folder / "munge.socket").exists, 20)
        _until(lambda: cluster.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60)
        yield cluster


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AssertionError):
            if condition():
                return
        assert time.monotonic() < deadline, "the cluster has not come up: see its logs"
        time.sleep(0.2)
