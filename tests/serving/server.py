"""A server in a process group of its own, which ends with the test, and with the test session if that is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

__all__ = ["Server", "free_port", "serving"]

END = 30.0  # seconds that a server gets to end by itself


@dataclass(frozen=True)
class Server:
    """One that speaks OpenAI's API, and serves ``model``."""

    url: str
    model: str

    def get(self, path: str) -> str:
        with urlopen(f"{self.url}{path}", timeout=60) as response:
            return str(response.read().decode())

    def post(self, path: str, **body: Any) -> Any:
        request = Request(f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=600) as response:
            return json.load(response)

    def log_probs(self, tokens: Sequence[int]) -> list[float]:
        """Of each token but the first."""
        body = {"model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0}
        found = self.post("/v1/completions", **body, prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
        return [found[place][str(tokens[place])]["logprob"] for place in range(1, len(tokens))]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        tokens: list[int] = self.post("/v1/completions", **body, return_token_ids=True)["choices"][0]["token_ids"]
        return tokens

    def counters(self, prefix: str) -> dict[str, float]:
        """Counters of Prometheus, without what follows ``prefix`` in braces."""
        lines = (line for line in self.get("/metrics").splitlines() if line.startswith(prefix))
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if "_created" not in line}


@contextmanager
def serving(
    command: Sequence[str],
    *,
    server: Server,
    ready: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    cwd: Path,
    timeout: float = 1200,
) -> Iterator[Server]:
    """Start ``command``, which must not leave its process group, and wait until ``server`` answers at ``ready``."""
    with log.open("w") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env={**os.environ, **(environment or {})},
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(server, ready, process, log, timeout)
        yield server
    finally:
        _end(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(server: Server, path: str, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{log.read_text()[-5000:]}")
        try:
            server.get(path)
            return
        except (URLError, OSError):
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer in {timeout} s:\n{log.read_text()[-5000:]}") from None
            time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """All of the group: asked first, and killed if somebody stays."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + END
        while (left := _members(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
    process.wait()
    assert not left, f"processes {left} survive SIGKILL"


def _members(group: int) -> list[int]:
    """Who runs in it; the ended may be listed for long where the first process of a container waits for nobody."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended just now
            state, _, its_group, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                found.append(int(folder.name))
    return found
