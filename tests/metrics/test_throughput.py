import pytest
import torch

from lightning_dualpipe.metrics import TokenRate, flops_utilization, num_tokens
from lightning_dualpipe.metrics.throughput import _bf16_peak


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_in_a_pause_does_not_count() -> None:
    clock = Clock()
    rate = TokenRate(clock)
    rate.run()
    rate.add(30)
    clock.now += 2
    rate.pause()
    clock.now += 50
    rate.run()
    rate.add(12)
    clock.now += 1
    assert rate.lap() == (42, 3.0)


def test_a_lap_begins_where_the_last_one_ended() -> None:
    clock = Clock()
    rate = TokenRate(clock)
    rate.run()
    rate.add(5)
    clock.now += 1
    rate.lap()
    clock.now += 4
    rate.add(7)
    assert rate.lap() == (7, 4.0)
    rate.pause()
    rate.lap()
    clock.now += 9
    assert rate.lap() == (0, 0.0)


def test_to_run_twice_is_to_run_once() -> None:
    clock = Clock()
    rate = TokenRate(clock)
    rate.run()
    clock.now += 1
    rate.run()
    clock.now += 1
    assert rate.lap() == (0, 2.0)


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": torch.zeros(3, 5), "labels": torch.zeros(3, 5)}, 15),
        ({"input_ids": torch.zeros(0, 5)}, 0),
        ({"pixels": torch.zeros(3, 5)}, 0),
        ({"input_ids": [[1, 2]]}, 0),
        ((torch.zeros(3, 5), torch.zeros(3)), 0),
        (None, 0),
    ],
)
def test_tokens_are_the_positions_of_the_inputs(batch: object, tokens: int) -> None:
    assert num_tokens(batch) == tokens


def test_nobody_knows_the_peak_of_a_cpu() -> None:
    assert flops_utilization(1e12, device=torch.device("cpu"), dtype=torch.float32) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet_without_sparsity(name: str, peak: float | None) -> None:
    assert _bf16_peak(name) == peak
