"""A training over two hosts loses one of them: it ends, says what was lost, and goes on when the host is back.

sudo python -m pytest -m hosts -s tests/hosts/test_cut_off.py          # some 2 minutes; -s shows what happens when
"""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts.namespaces import Host, two_hosts
from tests.hosts.training import EXAMPLES, environment, losses, write_configuration
from tests.marks import needs_commands, needs_root

STEPS, CUT_AT = 40, 12
TIMEOUT = 15  # seconds that a collective may wait
AFTER = 25  # more for a host to end: ranks ask who is lost, torchrun ends the rest; the machine may be busy
PATIENCE = 300  # for whole runs


@contextmanager
def started(hosts: Sequence[Host], configuration: Path, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The command of ``examples/torchrun.sh`` on each host; what they print is in HOST.log."""
    processes = []
    try:
        for number, host in enumerate(hosts):
            place = {"HEAD": "hosta:29512", "NODES": "2", "NODE": str(number), "DEVICES": "2"}
            variables = environment(folder, {**place, **host.environment, "CONFIG": str(configuration)})
            command = host.command("bash", str(EXAMPLES / "torchrun.sh"), "--ckpt_path", "newest:checkpoints")
            with open(folder / f"{host.name}.log", "a") as log:
                processes.append(subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=log))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_whole(hosts: Sequence[Host], configuration: Path, folder: Path) -> dict[int, str]:
    with started(hosts, configuration, folder) as processes:
        codes = [process.wait(PATIENCE) for process in processes]
    assert codes == [0, 0], (folder / "hosta.log").read_text()[-3000:]
    return losses(folder)


def run_until_cut(hosts: Sequence[Host], configuration: Path, folder: Path) -> list[float]:
    """Seconds from the cut until torchrun has ended, by host."""
    seconds = []
    with started(hosts, configuration, folder) as processes:
        deadline = time.monotonic() + PATIENCE
        while max(losses(folder), default=0) < CUT_AT:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
        hosts[1].unplug()
        cut = time.monotonic()
        for process in processes:
            assert process.wait(TIMEOUT + AFTER) == 1
            seconds.append(time.monotonic() - cut)
        assert [host.processes() for host in hosts] == [[], []], "nothing is left"
    return seconds


def last_words(folder: Path, host: Host) -> str:
    return (folder / f"{host.name}.log").read_text().rpartition("Root Cause")[2]


@pytest.mark.hosts
@pytest.mark.timeout(900)
@needs_root
@needs_commands("ip", "unshare")
def test_a_run_that_loses_a_host_ends_says_so_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    configuration = write_configuration(tmp_path, steps=STEPS, every=5, timeout=TIMEOUT)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    with two_hosts(tmp_path) as hosts:
        expected = run_whole(hosts, configuration, whole)
        assert list(expected) == list(range(STEPS))

        seconds = run_until_cut(hosts, configuration, cut)
        print(f"\ncut off after step {max(losses(cut))}; torchrun ended {seconds[0]:.1f} and {seconds[1]:.1f} s later")
        told = [last_words(cut, host) for host in hosts]
        assert "on hosta has lost its connection to another rank: no word from ranks 2, 3, all of hostb" in told[0]
        assert "on hostb has lost its connection to another rank: hosta, the host of rank 0, does not answer" in told[1]
        for words in told:  # and what it waited for, unless the cable was pulled within a collective
            print("\n".join(line.strip() for line in words.splitlines() if "lost" in line or "waited" in line))

        hosts[1].plug_in()
        found = run_whole(hosts, configuration, cut)
    (resumed,) = {line.split()[-1] for line in (cut / "hosta.log").read_text().splitlines() if "Restored all" in line}
    print(
        f"went on from {resumed}; the losses of all {len(found)} steps are those of the whole run: {found == expected}"
    )
    assert found == expected, "to the last bit"
