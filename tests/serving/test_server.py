"""Servers end with the test, whatever they do about it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serving import server as server_module
from tests.serving.conftest import ROOT
from tests.serving.server import Server, free_port, serving

STUBBORN = """
import http.server, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open("pids", "w").write(f"{os.getpid()} {child.pid}")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_one_that_will_not_end_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "END", 0.5)
    port = free_port()
    command = [sys.executable, "-c", STUBBORN, str(port)]
    server = Server(f"http://127.0.0.1:{port}", "none")
    with serving(command, server=server, ready="/", log=tmp_path / "log", cwd=tmp_path):
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


def test_one_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no weights')"]
    server = Server(f"http://127.0.0.1:{free_port()}", "none")
    with (
        pytest.raises(AssertionError, match="ended with 1:\nno weights"),
        serving(command, server=server, ready="/", log=tmp_path / "log", cwd=tmp_path),
    ):
        pass


def test_one_whose_test_session_is_killed_ends_too(tmp_path: Path) -> None:
    port = free_port()
    session = f"""
import os, pathlib, signal, sys
from tests.serving.server import Server, serving
server = Server("http://127.0.0.1:{port}", "none")
command = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"]
with serving(command, server=server, ready="/", log=pathlib.Path("log"), cwd=pathlib.Path()):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", session], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _answers(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _answers(port)


def _answers(port: int) -> bool:
    try:
        Server(f"http://127.0.0.1:{port}", "none").get("/")
    except OSError:
        return False
    return True
