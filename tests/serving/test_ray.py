"""``examples/serving/ray_serve.yaml``, with the commands in it, where Ray is in vLLM's environment.

LIGHTNING_DUALPIPE_VLLM=vllm-venv python -m pytest tests/serving/test_ray.py -rP
"""

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml

from tests.marks import needs_program, program
from tests.serving.conftest import ROOT, Trained
from tests.serving.server import Server, free_port, serving

BIN = program("vllm").parent
pytestmark = [
    needs_program("vllm"),
    pytest.mark.skipif(not (BIN / "serve").is_file(), reason="needs ray[serve] beside vLLM"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ray")
    config = yaml.safe_load((ROOT / "examples" / "serving" / "ray_serve.yaml").read_text())
    (model,) = config["applications"][0]["args"]["llm_configs"]
    model["model_loading_config"]["model_source"] = str(trained.directory)
    config["http_options"]["port"] = port = free_port()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    start = (
        f"{BIN}/ray start --head --num-cpus=8 --port={free_port()} --node-ip-address=127.0.0.1 --disable-usage-stats"
    )
    command = ["bash", "-c", f"{start} --include-dashboard=false && exec {BIN}/serve run config.yaml"]
    server = Server(f"http://127.0.0.1:{port}", model["model_loading_config"]["model_id"])
    temporary = tempfile.mkdtemp()  # of a short name: paths of sockets must be short
    try:
        with serving(
            command,
            server=server,
            ready="/v1/models",
            log=folder / "log",
            environment={"RAY_TMPDIR": temporary, "TMPDIR": temporary},
            cwd=folder,
        ):
            # Models are listed before there is a replica: this waits for it, so that no process is started in a test.
            assert len(server.greedy([0], 1)) == 1
            answer(server)
            yield server
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def test_ray_serves_our_numbers_and_our_texts(server: Server, trained: Trained) -> None:
    for text in trained.held_out[:4]:
        difference = float((torch.tensor(server.log_probs(text)) - trained.log_probs(text)).abs().max())
        print(f"largest difference of log-probabilities: {difference:.1e}")
        assert difference < 1e-4
        assert server.greedy(text[:100], 32) == trained.greedy(text[:100], 32)


def test_ray_answers_messages(server: Server) -> None:
    choice = answer(server)
    assert choice["finish_reason"] == "length" and choice["message"]["content"]


def answer(server: Server) -> Any:
    messages = [{"role": "user", "content": "What is a pipeline?"}]
    body = {"model": server.model, "messages": messages, "max_tokens": 8, "temperature": 0}
    (choice,) = server.post("/v1/chat/completions", **body)["choices"]
    return choice
