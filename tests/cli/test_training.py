"""``fit``, ``validate``, ``test`` and ``predict`` as a user types them."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lightning_dualpipe import DeepSeekV3, DualPipeStrategy, FP8Precision
from lightning_dualpipe.cli import main
from lightning_dualpipe.cli.training import TrainingCLI
from lightning_dualpipe.cli.typos import what_was_meant
from tests.checkpoint.damage import write

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "log_every_n_steps": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "limit_predict_batches": 1,
        "enable_progress_bar": False,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": ""}},
    },
    "model": {
        "class_path": "lightning_dualpipe.DeepSeekV3",
        "init_args": {
            "overrides": {"hidden_size": 32, "num_hidden_layers": 3, "kv_lora_rank": 16, "intermediate_size": 32},
            "warmup_steps": 2,
        },
    },
    "data": {
        "class_path": "lightning_dualpipe.TextDataModule",
        "init_args": {"path": "corpus.txt", "sequence_length": 16, "batch_size": 4},
    },
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text("a pipeline is as fast as its slowest stage, and no faster. " * 200)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return "config.yaml"


@pytest.fixture(autouse=True)
def alone_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns of arguments that come from two sides, and seeds through the environment.

    Lightning's log handler writes to the standard error it found when it was imported, maybe another test's.
    """
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(sys, "argv", ["lightning-dualpipe"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def run(command: str, config: str, *args: str) -> int:
    try:
        return main([command, "--config", config, *args])
    except SystemExit as end:
        return int(end.code or 0)


def test_a_run_is_trained_resumed_and_evaluated(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", config) == 0
    (checkpoint,) = Path("runs").glob("version_0/checkpoints/*.ckpt")
    assert Path("runs/version_0/metrics.csv").is_file()
    assert yaml.safe_load(Path("runs/version_0/config.yaml").read_text())["seed_everything"] == 0

    assert run("fit", config, "--ckpt_path", str(checkpoint), "--trainer.max_steps", "6") == 0
    assert list(Path("runs").glob("version_1/checkpoints/*step=6.ckpt"))
    for command in ("validate", "test", "predict"):
        assert run(command, config, "--ckpt_path", str(checkpoint)) == 0
    said = capsys.readouterr().out
    assert "val_loss" in said
    assert "test_loss" in said


def test_there_is_no_advertisement(config: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert run("fit", config, "--trainer.fast_dev_run", "true") == 0
    assert "TPU available" in caplog.text  # so the messages of this logger are heard
    assert "litlogger" not in caplog.text
    assert "litmodels" not in caplog.text


def test_the_configuration_of_the_user_is_left_alone(config: str) -> None:
    before = Path(config).read_bytes()
    assert run("fit", config, "--trainer.logger", "false", "--trainer.max_steps", "1") == 0
    assert Path(config).read_bytes() == before


def test_model_and_data_have_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        main(["fit", "--print_config"])
    except SystemExit as end:
        assert not end.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "lightning_dualpipe.DeepSeekV3"
    assert printed["data"]["class_path"] == "lightning_dualpipe.TextDataModule"


def test_model_and_data_may_be_anybodys(config: str) -> None:
    args = ["--model", "examples.your_own_model.LanguageModel", "--model.depth", "2", "--trainer.fast_dev_run", "true"]
    assert run("fit", config, *args) == 0


STRATEGY = "--trainer.strategy lightning_dualpipe.DualPipeStrategy"
REFUSED = {  # arguments -> what is said; the typed errors of the parser, and ours
    "--model.preset huge": "Expected a typing.Literal['tiny', 'small', '16b', '671b']",
    "--model.overrides.num_layers 3": "Unexpected keys: {'num_layers'}",
    "--model.overrides.num_hidden_layers three": "Expected a <class 'int'>",
    "--model.learning_rte 1e-3": "Option 'learning_rte' is not accepted",
    "--data.sequence_lenght 8": "Option 'sequence_lenght' is not accepted",
    "--trainer.max_stepps 8": "max_stepps",
    "--config nowhere.yaml": "nowhere.yaml",
    "--trainer.strategy dualpip": "trainer.strategy='dualpip' is no strategy; did you mean dualpipe",
    "--model.overrides.num_attention_heads 0": "num_attention_heads=0 must be an integer of at least 1",
    "--data.sequence_length 0": "sequence_length=0: at least 1 token is needed",
    "--data.path nowhere": "path='nowhere' does not exist",
    "--trainer.strategy dualpipe --trainer.devices 3": "dualpipe needs an even number of pipeline ranks, got 3",
    f"{STRATEGY} --trainer.strategy.schedule dualpip": "Expected a typing.Literal['dualpipe', 'dualpipev'",
    f"{STRATEGY} --trainer.strategy.num_microbatches 0": "num_microbatches=0 must be a positive whole number",
}


@pytest.mark.parametrize("args", REFUSED)
def test_what_cannot_run_is_explained_without_a_traceback(
    args: str, config: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", config, *args.split()) == 2
    said = capfd.readouterr().err
    assert REFUSED[args] in said
    assert "Traceback" not in said
    assert "Given value: Namespace" not in said


STEPS = "lightning_dualpipe.callbacks.StepTimeline"
MISSPELT = {  # in a file -> the last line
    "model: {init_args: {overrides: {num_hiden_layers: 8}}}": "'num_hiden_layers' is none of the keys of overrides; "
    "did you mean 'num_hidden_layers'?",
    "trainer: {strategy: {class_path: lightning_dualpipe.DualPipeStrategy, init_args: {schedul: zb1p}}}": "'schedul' "
    "is none of the arguments of lightning_dualpipe.DualPipeStrategy; did you mean 'schedule'?",
    "model: {init_args: {learning_rte: 1.0e-3}}": "'learning_rte' is none of the arguments of "
    "lightning_dualpipe.DeepSeekV3; did you mean 'learning_rate'?",
    f"trainer: {{callbacks: [{{class_path: {STEPS}, init_args: {{when: 3}}}}]}}": "'when' is none of the arguments of "
    f"{STEPS}, which are step, every_n_steps",
    "model: {class_path: lightning_dualpipe.DeepSekV3}": "'DeepSekV3' is none of the names in lightning_dualpipe; "
    "did you mean 'DeepSeekV3'?",
    "model: {class_path: lightning_dualpipe.DeepSeekV3, init_arg: {seed: 1}}": "'init_arg' is none of the keys beside "
    "class_path: lightning_dualpipe.DeepSeekV3; did you mean 'init_args'?",
    "trainer: {acelerator: cpu}": "'trainer.acelerator' is none of the options; did you mean 'trainer.accelerator'?",
    "modle: {class_path: lightning_dualpipe.DeepSeekV3}": "'modle' is none of the options; did you mean 'model'?",
}


@pytest.mark.parametrize("text", MISSPELT)
def test_the_last_line_says_what_was_misspelt_and_what_was_meant(
    text: str, config: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("typo.yaml").write_text(text)
    assert run("fit", config, "--config", "typo.yaml") == 2
    *before, last = capfd.readouterr().err.rstrip("\n").split("\n")
    assert last == MISSPELT[text]
    assert any(line.startswith("error: ") for line in before)  # whatever else the parser has to say


def test_a_message_of_another_kind_is_left_alone() -> None:
    for message in ("Parser key 'model': something else", "Option 'x' is not accepted before subcommand 'fit'"):
        assert what_was_meant(message, ["config"]) is None
    assert what_was_meant("module 'not_there' has no attribute 'x'") is None


def test_an_error_that_nobody_foresaw_keeps_its_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the middle of a step")

    monkeypatch.setattr("lightning_dualpipe.DeepSeekV3.training_step", fail)
    with pytest.raises(ZeroDivisionError, match="in the middle of a step"):
        run("fit", config)


NO_TRAININGS = {"serving", "kubernetes", "evaluation"}
TRAININGS = [path for path in sorted(EXAMPLES.rglob("*.yaml")) if path.parent.name not in NO_TRAININGS]


@pytest.mark.parametrize("example", TRAININGS, ids=lambda path: path.stem)
def test_the_examples_are_configurations(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", str(example), "--print_config") == 0
    assert "lightning_dualpipe.DualPipeStrategy" in capsys.readouterr().out


def command(launcher: str, args: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """``lightning-dualpipe ARGS``, or examples/torchrun.sh, which runs ``lightning-dualpipe fit`` in two processes."""
    console = folder / "lightning-dualpipe"
    console.write_text(f'#!/bin/sh\nexec {sys.executable} -m lightning_dualpipe.cli "$@"\n')
    console.chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TMPDIR": str(folder), "DEVICES": "2", "CONFIG": "config.yaml"}
    whole = [str(console), "fit", "--config", "config.yaml"] if launcher == "popen" else [str(EXAMPLES / "torchrun.sh")]
    return subprocess.run([*whole, *args], capture_output=True, text=True, timeout=200, env=environment)


TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy", "dualpipe", "--trainer.max_steps", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["popen", "torchrun"])
def test_two_processes_train_one_model(launcher: str, config: str, tmp_path: Path) -> None:
    report = ["--trainer.callbacks", "lightning_dualpipe.callbacks.RunReport"]
    done = command(launcher, [*TWO_RANKS, *report], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks: pipeline 2 x data 1, schedule dualpipe" in done.stderr
    assert done.stderr.count("`max_steps=2` reached") == 1
    (path,) = re.findall(r"^checkpoint +(\S+)$", done.stderr, flags=re.MULTILINE)
    assert Path(path).is_file()


@pytest.mark.slow
def test_what_cannot_run_on_any_rank_is_explained_once_and_last(config: str, tmp_path: Path) -> None:
    done = command("popen", [*TWO_RANKS, "--data.path", "nowhere"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("path='nowhere' does not exist") == 1
    assert done.stderr.rstrip().endswith("path='nowhere' does not exist")
    assert "Traceback" not in done.stderr


def submitted(folder: Path, capsys: pytest.CaptureFixture[str], *, job: str) -> dict[str, Any]:
    """What ``lightning-dualpipe`` understands of the arguments that examples/train.sbatch starts it with."""
    srun = folder / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    variables = {"SLURM_JOB_ID": job, "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    environment = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    script = ["bash", str(EXAMPLES / "train.sbatch"), "--config", str(EXAMPLES / "train_671b.yaml")]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment)
    options, program, *args = done.stdout.splitlines()
    assert (options, program) == ("--kill-on-bad-exit", "lightning-dualpipe")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*args, "--print_config"])
    parsed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return parsed


def test_a_slurm_job_has_its_own_size_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the configuration says: that of 671b is for 256 nodes, and writes into runs/671b."""
    parsed = submitted(tmp_path, capsys, job="77")
    trainer, logger = parsed["trainer"], parsed["trainer"]["logger"]
    assert (trainer["num_nodes"], trainer["devices"]) == (2, "8")
    assert (logger["init_args"]["save_dir"], logger["init_args"]["name"]) == ("runs/77", "671b")
    assert parsed["trainer"]["default_root_dir"] == "runs/77"
    assert parsed["ckpt_path"] is None


def test_the_example_of_671b_asks_for_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = submitted(tmp_path, capsys, job="77")
    trainer, model, data = parsed["trainer"], parsed["model"]["init_args"], parsed["data"]["init_args"]
    (plugin,), strategy = trainer["plugins"], trainer["strategy"]["init_args"]
    assert trainer["precision"] is None  # which would be a second one beside the plugin
    assert repr(FP8Precision(**plugin["init_args"])) == repr(FP8Precision("block", weights="bf16-true"))
    assert DualPipeStrategy(**strategy).save_distributed_checkpoint == "async"
    assert data["batch_size"] == strategy["num_microbatches"] == 120 and data["batch_size_schedule"] is None
    hparams = DeepSeekV3(**model).hparams
    assert (hparams["recompute"], hparams["moments"]) == ("selective_fp8", "bfloat16")


def test_a_requeued_slurm_job_goes_on_from_its_own_newest_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ckpt_path(*, job: str) -> str | None:
        resumed: list[str | None] = []
        cli = TrainingCLI.__new__(TrainingCLI)  # what it does once the Trainer is there
        cli.trainer = SimpleNamespace(fit=lambda ckpt_path: resumed.append(ckpt_path))  # type: ignore[assignment]
        cli.fit(ckpt_path=submitted(tmp_path, capsys, job=job)["ckpt_path"])
        return resumed[0]

    steps = {("77", 0): 10, ("77", 1): 20, ("78", 0): 30}
    saved = {where: Path("runs/{}/671b/version_{}/checkpoints/last.ckpt".format(*where)) for where in steps}
    for where, path in saved.items():
        path.parent.mkdir(parents=True)
        write(0, str(path), steps[where])
    assert ckpt_path(job="77") == str(saved["77", 1])
    requeued = Path("runs/77/hpc_ckpt_1.ckpt")  # written when it was requeued, after the last regular one
    torch.save({"global_step": 25, "state_dict": {}}, requeued)
    assert ckpt_path(job="77") == str(requeued)
    requeued.write_bytes(requeued.read_bytes()[:100])
    with pytest.warns(UserWarning, match="skipped: runs/77/hpc_ckpt_1.ckpt"):
        assert ckpt_path(job="77") == str(saved["77", 1])
    tensors = saved["77", 1] / "rank-00000.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)  # noticed when it is loaded: not every task reads every byte before
    with pytest.warns(UserWarning, match="hpc_ckpt_1"):
        assert ckpt_path(job="77") == str(saved["77", 1])
    assert ckpt_path(job="79") is None
