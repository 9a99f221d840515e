"""``lightning-dualpipe plan`` from the command line."""

import json
import re
from pathlib import Path

import pytest

from lightning_dualpipe.cli import main
from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.hf_config import config_to_hf
from lightning_dualpipe.planner import DEEPSEEK

QUICK = "--preset 16b --gpus 64 --gpu h100 --batch-sequences 256"


def said(args: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *args.split()]) == 0
    return capsys.readouterr().out


def test_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(f"{QUICK} --top 2", capsys)
    assert out.startswith("16b, ")
    assert "on 64 x h100, fp8; a step is 256 sequences of 4096 tokens" in out
    assert "tokens/s/GPU" in out
    assert "recommended: DualPipeStrategy(" in out


def test_a_layout_can_be_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    pinned = "--schedule 1f1b,zb1p --pipeline 4 --expert 8 --microbatch-sequences 1"
    content = json.loads(said(f"{QUICK} {pinned} --json", capsys))
    layouts = [*content["fitting"], *content["too_large"]]
    assert {one["schedule"] for one in layouts} == {"1f1b", "zb1p"}
    assert {(one["pipeline"], one["expert"], one["num_microbatches"]) for one in layouts} == {(4, 8, 16)}


def test_options_reach_the_planner(capsys: pytest.CaptureFixture[str]) -> None:
    pinned = f"{QUICK} --schedule dualpipe --pipeline 4 --expert 8 --microbatch-sequences 1 --json"

    def one(options: str) -> dict:
        content = json.loads(said(f"{pinned} {options}", capsys))
        return (content["fitting"] + content["too_large"])[0]

    plain = one("")
    assert one("--no-recompute")["memory"]["activations"] > plain["memory"]["activations"]
    assert one("--no-overlap")["step"] > plain["step"]
    assert one("--precision bf16")["compute"] > plain["compute"]
    assert one("--gradient-bytes 2")["memory"]["gradients"] == plain["memory"]["gradients"] / 2
    assert one("--optimizer-bytes 6")["memory"]["optimizer"] == plain["memory"]["optimizer"] / 2
    assert one("--sequence-length 8192")["step"] > plain["step"]


def test_a_config_json_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_hf(DeepSeekV3Config.from_preset("16b"))))
    content = json.loads(said(f"--config {path} --gpus 64 --batch-sequences 256 --json --top 1", capsys))
    again = json.loads(said("--preset 16b --gpus 64 --batch-sequences 256 --json --top 1", capsys))
    assert content["model"] == "config.json"
    assert content["fitting"] == again["fitting"]


def test_measured_times_are_taken_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    DEEPSEEK.write(path)
    pinned = "--gpus 2048 --schedule dualpipe --pipeline 16 --expert 64 --json"
    from_file = json.loads(said(f"{pinned} --profile {path}", capsys))
    assert from_file == json.loads(said(f"{pinned} --profile deepseek", capsys))
    assert "profile-data" in from_file["times_from"]
    assert from_file["recommended"]["step"] != json.loads(said(pinned, capsys))["recommended"]["step"]


def test_what_has_no_fp8_is_planned_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(said("--preset small --gpus 8 --gpu a100 --json", capsys))["precision"] == "bf16"


USUAL = {
    "--gpus 4 --gpu cpu": ("tiny", 8, 256),
    "--gpus 8 --preset tiny": ("tiny", 8, 256),
    "--gpus 8 --preset small": ("small", 128, 1024),
    "--gpus 64 --preset 16b --schedule 1f1b": ("16b", 4608, 4096),
    "--gpus 2048 --pipeline 16 --expert 64 --schedule 1f1b": ("671b", 15360, 4096),
    "--gpus 64 --preset 16b --schedule 1f1b --batch-sequences 64": ("16b", 64, 4096),
    "--gpus 4 --gpu cpu --sequence-length 128": ("tiny", 8, 128),
}


@pytest.mark.parametrize("args", USUAL)
def test_a_model_is_planned_with_the_batch_it_is_usually_trained_on(
    args: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(said(f"{args} --top 1 --json", capsys))
    assert (content["model"], content["batch_sequences"], content["sequence_length"]) == USUAL[args]


def test_a_config_json_is_no_longer_than_its_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_hf(DeepSeekV3Config.from_preset("tiny", max_position_embeddings=512))))
    content = json.loads(said(f"--config {path} --gpus 8 --top 1 --json", capsys))
    assert (content["batch_sequences"], content["sequence_length"]) == (15360, 512)


NOTHING_FITS = {
    "--preset 671b --gpus 8 --gpu cpu --pipeline 8 --schedule 1f1b,zb1p --json": (
        r"cpu has 12 GB, and the smallest of \d+ layouts \(1f1b pipeline 8 expert 1 microbatch 1\) needs [\d.]+; "
        r"give more --gpus or a shorter --sequence-length, or let the planner choose --pipeline"
    ),
    "--preset 671b --gpus 64 --schedule 1f1b --no-recompute": (
        r"h800 has 80 GB, and the smallest of \d+ layouts .* needs [\d.]+; give more --gpus or a shorter "
        r"--sequence-length, or leave out --no-recompute"
    ),
}


@pytest.mark.parametrize("args", NOTHING_FITS)
def test_where_nothing_fits_the_command_fails_and_says_so_in_a_line(
    args: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *args.split()]) == 1
    told = capsys.readouterr()
    assert re.fullmatch(f"lightning-dualpipe: error: nothing fits: {NOTHING_FITS[args]}\n", told.err)
    if "--json" in args:
        assert json.loads(told.out)["fitting"] == []
    else:
        assert "\n0 of " in told.out


REFUSED = {
    "--gpus 64 --preset 617b": "preset='617b' is not one of tiny, small, 16b, 671b; did you mean '671b'?",
    "--gpus 64 --gpu h8000": "gpu='h8000' is none of h800, h100, h200, b200, a100, cpu; did you mean 'h800'?",
    "--gpus 64 --schedule 1f1": "is none of dualpipe, dualpipev, zb1p, 1f1b, gpipe; did you mean '1f1b'?",
    "--gpus 60 --pipeline 16": "pipeline=16 does not divide gpus=60",
    "--gpus 64 --pipeline 16 --batch-sequences 7": "pipeline 16: 4 pipelines do not divide a batch of 7 sequences",
    "--gpus 64 --profile absent.json": "the profile absent.json cannot be read as JSON",
    "--gpus 64 --config absent.json": "config=absent.json cannot be read as JSON",
    "--gpus 64 --top 0": "top=0: at least 1 layout is shown",
    "--gpus 64 --sequence-length 0": "sequence_length=0: at least 1 token is needed",
    "--gpus many": "argument --gpus: invalid int value: 'many'",
    "": "the following arguments are required: --gpus",
}


@pytest.mark.parametrize("args", REFUSED)
def test_what_cannot_be_planned_is_explained_in_one_message(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", *args.split()])
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    assert code == 2
    assert REFUSED[args] in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


def test_several_mistakes_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "64", "--preset", "617b", "--gpu", "h8000"]) == 2
    told = capsys.readouterr().err
    assert "617b" in told
    assert "h8000" in told
