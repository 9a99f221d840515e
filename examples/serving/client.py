"""Ask a served model, by OpenAI's API and with nothing but the standard library.

    python examples/serving/client.py "import os"                           # goes on with a text
    python examples/serving/client.py --chat "What is a pipeline?" --stream  # answers, word by word

Programs that use the package ``openai`` need the address only:

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


class NoAnswer(Exception):
    """The server is not there, or refuses; the message says which."""


def main() -> int:
    asked = parse()
    try:
        for piece in answer(asked):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except NoAnswer as problem:
        sys.stderr.write(f"client.py: {problem}\n")
        return 1
    sys.stdout.write("\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="default: the one that is served")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, to be answered")
    parser.add_argument("--stream", action="store_true", help="write the text while it comes")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for the next word of the server")
    return parser.parse_args()


def answer(asked: argparse.Namespace) -> Iterator[str]:
    """The text, in one piece or as it comes.

    Raises:
        NoAnswer: no server there, or one that refuses.
    """
    model = asked.model or served_model(asked.url, asked.timeout)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "stream": asked.stream,
    }
    if asked.chat:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": asked.prompt}]
    else:
        path, body["prompt"] = "completions", asked.prompt
    lines = request(f"{asked.url}/v1/{path}", asked.timeout, body)
    for reply in events(lines) if asked.stream else [json.loads("".join(lines))]:
        for choice in reply["choices"]:  # the last event may have none
            said = choice.get("delta") or choice.get("message") or {}
            yield (said.get("content") if asked.chat else choice["text"]) or ""


def served_model(url: str, timeout: float) -> str:
    name: str = json.loads("".join(request(f"{url}/v1/models", timeout)))["data"][0]["id"]
    return name


def events(lines: Iterator[str]) -> Iterator[Any]:
    """Server-sent events, each a line of JSON behind ``data:``."""
    for line in lines:
        field, _, value = line.partition(":")
        if field == "data" and value.strip() != "[DONE]":
            yield json.loads(value)


def request(url: str, timeout: float, body: dict[str, Any] | None = None) -> Iterator[str]:
    """Lines of the answer; a ``body`` is posted."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=timeout) as response:
            for line in response:
                yield line.decode()
    except HTTPError as error:
        with error:
            said = error.read().decode(errors="replace")
        raise NoAnswer(f"{url} answers {error.code}: {said}") from None
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise NoAnswer(
            f"no answer from {url} ({reason}): is the server up? Starting takes it a minute or two"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
