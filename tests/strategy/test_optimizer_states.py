"""Optimizer states belong to the parameters they were saved for, whatever the order and the shapes the user chose.

``Trainer(strategy="auto")`` is the oracle, and takes turns with the layouts: each goes on from the other's checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adafactor, AdamW, Optimizer

from lightning_dualpipe.checkpoint.optimizer_states import Collected, check_states, in_order
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.bf16_adamw import BF16AdamW
from tests.ranks import run_ranks
from tests.strategy.runs import Recorder, Run, build, write_corpus

STEPS, TURN = 12, 4


def head_first_and_blocks_in_reverse(module: Any) -> Optimizer:
    """Blocks of one shape change places, and ranks may hold either end."""
    model = module.model
    blocks = [parameter for block in reversed(model.blocks) for parameter in block.parameters()]
    first, last = [model.lm_head.weight, *blocks], [*model.mtp.parameters(), *model.norm.parameters()]
    return AdamW([*first, *last, *model.embed_tokens.parameters()], lr=1e-2)


def with_names_in_two_groups(module: Any) -> Optimizer:
    named = list(module.named_parameters())[::-1]
    matrices, vectors = [(n, p) for n, p in named if p.ndim >= 2], [(n, p) for n, p in named if p.ndim < 2]
    return AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], lr=1e-2)


def factored(module: Any) -> Optimizer:
    """Without what looks at all experts at once: clipping of the update, and a step by the size of the parameter."""
    return Adafactor(module.parameters(), lr=0.01, eps=(None, 1.0), d=1e9)


def in_bfloat16(module: Any) -> Optimizer:
    return BF16AdamW(module.parameters(), lr=1e-2)


Make = Callable[[Any], Optimizer]
PP2, ONE_WAY = {"pipeline_parallel_size": 2}, {"schedule": "1f1b", "pipeline_parallel_size": 2}
CASES: Mapping[str, tuple[Make, int, Mapping[str, Any]]] = {
    "another order, dualpipe pp2": (head_first_and_blocks_in_reverse, 2, PP2),
    "another order, 1f1b pp2": (head_first_and_blocks_in_reverse, 2, ONE_WAY),
    "names, 1f1b pp2": (with_names_in_two_groups, 2, ONE_WAY),
    "moments in bfloat16, pp1 ep2": (in_bfloat16, 2, {"pipeline_parallel_size": 1, "expert_parallel_size": 2}),
    "factored, pp1 ep2": (factored, 2, {"pipeline_parallel_size": 1, "expert_parallel_size": 2}),
    "factored, pp1 ep4": (factored, 4, {"pipeline_parallel_size": 1, "expert_parallel_size": 4}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("states"))


def train(rank: int, run: Run, make: Make, source: str | None, target: str | None) -> list[float]:
    trainer, module, data = build(rank, run)
    module.configure_optimizers = MethodType(make, module)  # type: ignore[method-assign]
    trainer.fit(module, data, ckpt_path=source)
    if target is not None:
        trainer.save_checkpoint(target)
    return next(callback for callback in trainer.callbacks if isinstance(callback, Recorder)).losses


_ALONE: dict[Make, list[float]] = {}


@pytest.mark.parametrize("auto_first", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_auto_and_a_layout_take_turns(case: str, auto_first: bool, corpus: str, tmp_path: Path) -> None:
    make, world, strategy = CASES[case]
    alone, spread = Run(corpus=corpus, steps=STEPS), Run(strategy=strategy, world=world, corpus=corpus)
    if make not in _ALONE:
        _ALONE[make] = train(0, alone, make, None, None)

    losses, source = [], None
    for turn in range(3):
        run = replace(alone if auto_first == (turn % 2 == 0) else spread, steps=TURN * (turn + 1))
        target = str(tmp_path / f"{turn}.ckpt")
        arguments = run, make, source, target
        losses += train(0, *arguments) if run.world == 1 else run_ranks(run.world, train, *arguments, timeout=240)[0]
        source = target

    assert losses == pytest.approx(_ALONE[make], abs=1e-9)
    one, other = (torch.load(tmp_path / f"{turn}.ckpt", weights_only=True)["optimizer_states"][0] for turn in (0, 1))
    assert one["param_groups"] == other["param_groups"]
    for state, same in zip(one["state"].values(), other["state"].values(), strict=True):
        assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in same.items()}


def test_states_of_other_parameters_are_refused_before_a_step(corpus: str, tmp_path: Path) -> None:
    """Nobody wrote names down, and the order is another: shapes are what is left."""
    path = str(tmp_path / "auto.ckpt")
    train(0, Run(corpus=corpus, steps=1), head_first_and_blocks_in_reverse, None, path)
    run = Run(strategy=PP2, world=2, corpus=corpus, steps=2)
    with pytest.raises(AssertionError, match=r"states do not fit(.*\n)+.*'exp_avg': shape"):
        run_ranks(2, train, run, _in_model_order, path, None)


def _in_model_order(module: Any) -> Optimizer:
    return AdamW(module.parameters(), lr=1e-2)


# ---- what nobody can put together --------------------------------------------------------------


def collect(shape: tuple[int, ...], states: list[dict[str, Any]], *, rows_apart: bool = False) -> dict[str, Any]:
    collected, rows = Collected(lambda _: shape, rows_apart), shape[0] // len(states)
    for rank, state in enumerate(states):
        collected.add("experts", state, range(rank * rows, (rank + 1) * rows), None)
    collected.check()
    return collected.states["experts"]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def test_what_has_the_rows_in_front_is_put_together_by_rows() -> None:
    found = collect((4, 3, 5), [{"row": zeros(2, 3, 1), "column": torch.full((2, 1, 5), float(r))} for r in range(2)])
    assert found["row"].shape == (4, 3, 1)
    assert found["column"][:, 0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("shape", "state"),
    [
        ((4, 5), {"row": zeros(2, 1), "column": zeros(1, 5)}),  # a mean over the experts of this rank
        ((4, 3, 5), {"left": zeros(2, 2)}),  # experts by experts
        ((4, 3, 5), {"middle": zeros(1, 3, 1)}),
    ],
)
def test_what_sums_over_the_rows_of_a_rank_is_refused(shape: tuple[int, ...], state: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be saved(.*\n)+  - experts, '\w+': shape .* on a rank"):
        collect(shape, [state, state])


def test_with_one_row_on_each_rank_a_first_dimension_of_one_is_trusted_only_where_it_is_known() -> None:
    factored = {"row": zeros(1, 3, 1), "column": zeros(1, 1, 5)}
    with pytest.raises(ConfigurationError, match="cannot be saved"):
        collect((2, 3, 5), [factored, factored])
    assert collect((2, 3, 5), [factored, factored], rows_apart=True)["row"].shape == (2, 3, 1)
    with pytest.raises(ConfigurationError, match="cannot be saved"):  # [1, 5] may be a row or a mean over rows
        collect((2, 5), [{"row": zeros(1, 1), "column": zeros(1, 5)}] * 2, rows_apart=True)
    assert collect((2, 5), [{"momentum": zeros(1, 5)}] * 2)["momentum"].shape == (2, 5)


def test_one_number_for_all_is_the_same_on_every_rank_or_refused() -> None:
    assert collect((4, 3), [{"step": torch.tensor(7.0), "scale": 0.5}] * 2) == {"step": 7.0, "scale": 0.5}
    with pytest.raises(ConfigurationError, match=r"'RMS': 1.0 on one rank, 2.0 on another"):
        collect((4, 3), [{"RMS": 1.0}, {"RMS": torch.tensor(2.0).item()}])


def test_a_state_over_all_rows_cannot_be_shared_out() -> None:
    states = {"experts": {"column": zeros(1, 5)}}
    check_states(states, lambda _: (4, 5), spread=lambda _: False, elementwise=False)
    with pytest.raises(ConfigurationError, match="its rows are on several ranks"):
        check_states(states, lambda _: (4, 5), spread=lambda _: True, elementwise=False)


# ---- groups that come later --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "parts", "expected"),
    [
        ([["c", "a", "b"]], [[["c", "b"]], [["a"]]], [["c", "a", "b"]]),  # as configure_optimizers had it
        ([["a"]], [[["a"], ["b"]], [[], ["c"]]], [["a"], ["b", "c"]]),  # a later one, from modules
        ([], [[["c", "b"]], [["b", "a"]]], [["c", "b", "a"]]),  # the only one that agrees with both
    ],
)
def test_the_order_of_all_parameters(
    known: list[list[str]], parts: list[list[list[str]]], expected: list[list[str]]
) -> None:
    assert in_order(known, parts, "abcd") == expected


@pytest.mark.parametrize(("parts", "why"), [(["ba", "dc"], "no rank has both"), (["ba", "ab"], "ranks disagree")])
def test_an_order_that_cannot_be_told_is_refused(parts: list[str], why: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parameter group 0 was added or changed .*{why}"):
        in_order([], [[list(part)] for part in parts], "abcd")
