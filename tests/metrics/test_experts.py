import pytest
import torch

from lightning_dualpipe.metrics import dead_experts, max_violation

LOADS = {
    "even": [5, 5, 5, 5],
    "all to one": [0, 0, 12, 0],
    "uneven": [1, 2, 3, 10],
    "one expert": [7],
    "nothing": [0, 0, 0],
    "more than float32 can count": [2**40, 2**40 + 2, 2**40, 2**40 - 2],
}


def by_definition(counts: list[int]) -> float:
    mean = sum(counts) / len(counts)
    return (max(counts) - mean) / mean if mean else 0.0


@pytest.mark.parametrize("counts", LOADS.values(), ids=LOADS)
def test_max_violation_is_the_excess_of_the_largest_load_over_the_mean(counts: list[int]) -> None:
    assert float(max_violation(torch.tensor(counts))) == by_definition(counts)


def test_when_all_tokens_choose_the_same_experts_it_is_the_number_of_experts_over_those_chosen_less_one() -> None:
    counts_E = torch.zeros(16, dtype=torch.int64)
    counts_E[[3, 5, 8, 13]] = 1000
    assert float(max_violation(counts_E)) == 16 / 4 - 1


def test_layers_are_measured_each_for_itself() -> None:
    counts_LE = torch.tensor([[1, 1], [3, 1], [0, 0]])
    assert max_violation(counts_LE).tolist() == [0.0, 0.5, 0.0]


def test_an_expert_is_dead_if_the_others_see_all_tokens() -> None:
    counts_LE = torch.tensor([[4, 0, 0], [1, 2, 3], [0, 0, 0]])
    assert dead_experts(counts_LE).tolist() == [2, 0, 0]
