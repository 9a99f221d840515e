"""The commands of ``examples/evaluate.md``: the harness reads what was exported, and finds our log-likelihoods.

LIGHTNING_DUALPIPE_LM_EVAL=lm-eval-venv python -m pytest tests/serving/test_evaluation.py -rP
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.marks import needs_program, program
from tests.serving.conftest import ROOT, Trained

TASK = "python_lines"
TASKS = ROOT / "examples" / "evaluation"
BOS = 256


@dataclass(frozen=True)
class Evaluation:
    accuracy: float
    documents: list[dict[str, Any]]
    log_likelihoods: torch.Tensor  # [documents, choices], float64


def test_the_local_task_has_one_right_answer_of_four_everywhere() -> None:
    """And the right one is in no favourite place, and no shorter than the others."""
    task = yaml.safe_load((TASKS / f"{TASK}.yaml").read_text())
    (file,) = task["dataset_kwargs"]["data_files"].values()
    documents = [json.loads(line) for line in (ROOT / file).read_text().splitlines()]
    assert task["task"] == TASK and len(documents) == 32
    for document in documents:
        assert document["text"] == document["text"].rstrip()  # the harness counts spaces at the end to the choices
        assert len(set(document["choices"])) == 4
        assert len({len(choice) for choice in document["choices"]}) == 1, document
    assert {document["label"] for document in documents} == {0, 1, 2, 3}


@needs_program("lm_eval")
@pytest.mark.timeout(1800)
def test_the_harness_finds_our_log_likelihoods_in_an_exported_model(trained: Trained, tmp_path: Path) -> None:
    found = evaluate(tmp_path, "hf", f"pretrained={trained.directory},dtype=float32,add_bos_token=True")
    ours = torch.tensor(
        [
            [log_likelihood(trained, document["text"], choice) for choice in document["choices"]]
            for document in found.documents
        ],
        dtype=torch.float64,
    )
    difference = float((found.log_likelihoods - ours).abs().max())
    print(f"{TASK}: accuracy {found.accuracy:.3f}, largest difference of log-likelihoods {difference:.1e}")
    torch.testing.assert_close(found.log_likelihoods, ours, atol=1e-4, rtol=0)

    labels = torch.tensor([document["label"] for document in found.documents])
    assert found.accuracy == pytest.approx(float((ours.argmax(1) == labels).double().mean()))
    assert found.accuracy > 0.5  # a model that has learnt nothing: a quarter


def evaluate(folder: Path, model: str, arguments: str) -> Evaluation:
    """Run the harness from the top of the repository, as the page says."""
    command = [str(program("lm_eval")), "run", "--model", model, "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", TASK, "--include_path", str(TASKS), "--output_path", str(folder), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    (results,), (samples,) = folder.glob("*/results_*.json"), folder.glob("*/samples_*.jsonl")
    documents = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return Evaluation(
        accuracy=json.loads(results.read_text())["results"][TASK]["acc,none"],
        documents=[line["doc"] for line in documents],
        log_likelihoods=torch.tensor(
            [[float(value) for value, _ in line["filtered_resps"]] for line in documents], dtype=torch.float64
        ),
    )


def log_likelihood(trained: Trained, text: str, ending: str) -> float:
    """Of the bytes of ``ending`` behind ``text``, which begins a document."""
    tokens, size = [BOS, *f"{text}{ending}".encode()], len(ending.encode())
    return float(trained.log_probs(tokens)[-size:].sum())
