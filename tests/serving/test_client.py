"""``examples/serving/client.py`` against a server that says what it was asked."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from tests.serving.conftest import ROOT
from tests.serving.server import free_port

CLIENT = ROOT / "examples" / "serving" / "client.py"
WORDS = ["one ", "tw\N{LATIN SMALL LETTER O WITH DIAERESIS} ", "three"]


class Echo(BaseHTTPRequestHandler):
    """OpenAI's API as servers speak it: whole, or as events that end with one without choices."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, dict[str, Any]]]

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"data": [{"id": "served"}, {"id": "another"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if body["model"] != "served":
            self._send("application/json", json.dumps({"error": {"message": "no such model"}}), status=404)
            return
        chat = self.path.endswith("chat/completions")
        if body["stream"]:
            choices = [[{"delta": {"content": word}} if chat else {"text": word}] for word in WORDS]
            choices = [[{"delta": {"role": "assistant"}}], *choices, []] if chat else [*choices, []]
            events = [f"data: {json.dumps({'choices': choice})}\n\n" for choice in choices]
            self._send("text/event-stream", ": a comment\n\n" + "".join(events) + "data: [DONE]\n\n")
        else:
            said = {"message": {"content": "".join(WORDS)}} if chat else {"text": "".join(WORDS)}
            self._send("application/json", json.dumps({"choices": [said]}))

    def _send(self, kind: str, text: str, status: int = 200) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Echo.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CLIENT), *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_all_that_was_said_is_written_and_what_was_asked_arrives(url: str, chat: bool, stream: bool) -> None:
    flags = [*(["--chat"] if chat else []), *(["--stream"] if stream else [])]
    done = ask("h\N{LATIN SMALL LETTER O WITH DIAERESIS}", "--url", url, "--max-tokens", "7", *flags)
    assert (done.stdout, done.stderr, done.returncode) == ("".join(WORDS) + "\n", "", 0)

    ((path, body),) = Echo.asked
    prompt = "h\N{LATIN SMALL LETTER O WITH DIAERESIS}"
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert body == {
        **({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}),
        "model": "served",
        "max_tokens": 7,
        "temperature": 0.0,
        "stream": stream,
    }


def test_what_the_server_refuses_is_told(url: str) -> None:
    done = ask("hello", "--url", url, "--model", "other")
    assert (done.stdout, done.returncode) == ("", 1)
    assert f"{url}/v1/completions answers 404" in done.stderr and "no such model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there_is_told() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = ask("hello", "--url", url)
    assert (done.stdout, done.returncode) == ("", 1)
    assert f"no answer from {url}" in done.stderr and "Traceback" not in done.stderr
