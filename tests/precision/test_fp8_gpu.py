"""``benchmarks/fp8_gpu.py`` measures a GPU; here its code runs by emulation, with shapes of no interest."""

import json

import pytest
import torch

from benchmarks import fp8_gpu
from benchmarks.fp8_gpu import Subject, Times, figures_of, main, uneven_counts
from tests.marks import needs_cuda
from tests.precision.fake_te import fake_te
from tests.precision.test_torch_backend import gpu, scaled_mm


def test_everything_is_measured_and_written_down(tmp_path, capsys):
    main(["--device", "cpu", "--tiny", "--json", "result.json"])
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("block", "experts"):
        for implementation in ("bf16", "emulate"):
            assert result[name][implementation]["tflops"] > 0
        assert result[name]["bf16"]["of_bf16"] == 1.0
    assert result["measured_peak_tflops"]["bf16"] > 0 and result["versions"]["CUDA of torch"]
    printed = capsys.readouterr().out
    assert "left out: te-block and torch-block" in printed and "x bf16" in printed


@needs_cuda
def test_a_gpu_is_measured(tmp_path):
    main(["--tiny", "--json", "result.json"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["left_out"]) + len(result["experts"]) == 3 + 3  # and parameters, tokens, flops


@pytest.fixture
def te():
    with fake_te():
        yield


def test_what_a_hopper_would_run_is_the_same_as_what_emulation_runs(te, monkeypatch):
    """One step of each implementation, over the fake and the checked product, with the same gradients."""
    monkeypatch.setattr(fp8_gpu, "why_not_te", lambda recipe: None)
    monkeypatch.setattr("lightning_dualpipe.precision.torch_backend.F.scaled_mm", scaled_mm)
    cuda, version = gpu()
    with cuda, version:
        found, missing = fp8_gpu.backends(torch.device("cuda"))
    assert list(found) == ["bf16", "te-block", "torch-block"] and not missing
    found["emulate"] = fp8_gpu.EmulateBackend(fp8_gpu.RECIPE)
    arguments, modules = fp8_gpu.parse(["--tiny"]), {}
    real = fp8_gpu.partial

    def watched(function, module, backend, *rest):
        modules[next(name for name, each in found.items() if each is backend)] = module
        return real(function, module, backend, *rest)

    monkeypatch.setattr(fp8_gpu, "partial", watched)
    for step in fp8_gpu.experts_subject(arguments, torch.device("cpu"), found).steps.values():
        step()
    gradients = {name: module.gate_up_proj.grad for name, module in modules.items()}
    for name, error in (("te-block", 0.01), ("torch-block", 0.01), ("bf16", 0.1)):
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - gradients["emulate"]).norm() < error * gradients["emulate"].norm()
    assert not torch.equal(gradients["bf16"], gradients["emulate"])


def test_without_a_gpu_it_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures a CUDA device and torch sees none here"):
        main([])


def test_figures_by_hand():
    subject = Subject("by hand", parameters=1, tokens=1, flops=1e12, steps={})
    times = {
        "bf16": [Times(2.0, 6.0), Times(4.0, 4.0), Times(2.0, 4.0)],
        "te": [Times(1.0, 3.0), Times(1.0, 1.0), Times(2.0, 1.0)],
    }
    found = figures_of(subject, times, {"bf16": 3e9, "te": None}, microbatches=2, peak=3.0)
    assert (found["bf16"].milliseconds, found["bf16"].tflops, found["bf16"].peak_gb) == (4000, 0.75, 3)
    assert (found["bf16"].forward_tflops, found["bf16"].backward_tflops) == (1.0, 1.0)
    assert (found["te"].of_bf16, found["te"].of_bf16_peak, found["te"].peak_gb) == (2.0, 2 / 3, None)


def test_rows_of_experts_are_uneven_and_all_there():
    counts = uneven_counts(4096 * 8, 32)
    assert sum(counts) == 4096 * 8 and min(counts) == 512 and max(counts) < 1600 and len(set(counts)) == 32
