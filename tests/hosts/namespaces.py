"""Two hosts on one machine: network namespaces with a cable between them, names of their own, and a hosts file.

    with two_hosts(folder) as (hosta, hostb):
        process = subprocess.Popen(hosta.command("torchrun", ...), env={**os.environ, **hosta.environment})
        hostb.unplug()

What they share is the file system, as the nodes of a cluster share one. Linux and root; nothing is left of
them afterwards, whatever runs there included.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Host", "two_hosts"]


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    namespace: str
    interface: str
    hosts_file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}

    def command(self, *command: str) -> list[str]:
        """``command`` as it is run on this host, in the process that starts it."""
        # A mount and a name of its own; /sys is the namespace's, where Slurm looks for control groups.
        mounts = f"mount --bind {self.hosts_file} /etc/hosts; mount -t tmpfs none /sys/fs/cgroup"
        prepare = f'hostname {self.name}; {mounts}; exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", prepare, "sh", *command]

    def unplug(self) -> None:
        _run("ip", "-n", self.namespace, "link", "set", self.interface, "down")

    def plug_in(self) -> None:
        _run("ip", "-n", self.namespace, "link", "set", self.interface, "up")

    def processes(self) -> list[int]:
        """All that run on this host."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        return [int(line) for line in listed.stdout.split()]


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """``hosta`` and ``hostb``; ``folder`` is for their hosts file."""
    hosts_file = folder / "hosts"
    hosts = tuple(
        Host(f"host{letter}", f"10.213.7.{number}", f"ldp{os.getpid()}{letter}", f"v{os.getpid()}{letter}", hosts_file)
        for number, letter in enumerate("ab", start=1)
    )
    lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in hosts)]
    hosts_file.write_text("\n".join(lines) + "\n")
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
        _run("ip", "link", "add", hosts[0].interface, "type", "veth", "peer", "name", hosts[1].interface)
        for host in hosts:
            _run("ip", "link", "set", host.interface, "netns", host.namespace)
            _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            host.plug_in()
        yield hosts[0], hosts[1]
    finally:
        _end(hosts)
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], stderr=subprocess.DEVNULL, check=False)


def _end(hosts: tuple[Host, ...]) -> None:
    """Everything that still runs there: a namespace lives as long as a process in it."""
    deadline = time.monotonic() + 10
    while (left := [process for host in hosts for process in host.processes()]) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
