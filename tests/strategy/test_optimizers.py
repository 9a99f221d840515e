"""Any optimizer gives the run of one process, and its states are on one rank each.

``Trainer(strategy="auto")`` is the oracle; layouts differ in the order of additions only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from lightning_dualpipe import DualPipeStrategy
from tests.ranks import run_ranks
from tests.strategy.runs import Recorder, Run, build, build_module, write_corpus

STEPS = 8
ELEMENTWISE: Mapping[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda parameters: AdamW(parameters, lr=1e-2),
    "SGD": lambda parameters: SGD(parameters, lr=0.2, momentum=0.9),
}
OPTIMIZERS = {**ELEMENTWISE, "Adafactor": lambda parameters: Adafactor(parameters, lr=0.02)}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dualpipe pp2": (2, {"pipeline_parallel_size": 2}),
    "dualpipe pp2 dp2": (4, {"pipeline_parallel_size": 2}),
    "dualpipe pp2 ep2": (4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "dualpipev pp2 dp2": (4, {"schedule": "dualpipev", "pipeline_parallel_size": 2}),
    "zb1p pp2 dp2": (4, {"schedule": "zb1p", "pipeline_parallel_size": 2}),
    "pp1 ep4": (4, {"pipeline_parallel_size": 1, "expert_parallel_size": 4}),
}


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    weights: dict[str, tuple[range | None, Tensor]]  # by first name; with its rows where it is spread
    state_bytes: int
    fair_share: float  # what this rank would have of states that are on one rank each: all / holders


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("optimizers"))


def train_with_each(rank: int, run: Run, names: list[str]) -> dict[str, Outcome]:
    return {name: _train(rank, run, OPTIMIZERS[name]) for name in names}


def _train(rank: int, run: Run, make: Callable[[Any], Optimizer]) -> Outcome:
    trainer, module, data = build(rank, run)
    module.configure_optimizers = MethodType(lambda self: make(self.parameters()), module)  # type: ignore[method-assign]
    trainer.fit(module, data)
    recorder = next(callback for callback in trainer.callbacks if isinstance(callback, Recorder))
    weights, share = _held(trainer, module)
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return Outcome(recorder.losses, recorder.norms, weights, sum(value.nbytes for value in states), share)


def _held(trainer: L.Trainer, module: L.LightningModule) -> tuple[dict[str, tuple[range | None, Tensor]], float]:
    if not isinstance(trainer.strategy, DualPipeStrategy):
        weights = {name: (None, parameter.detach()) for name, parameter in module.named_parameters()}
        return weights, float(sum(parameter.nbytes for parameter in module.parameters()))
    assembly = trainer.strategy.assembly
    assert assembly is not None
    named = assembly.named_parameters()
    weights = {name: (assembly.rows.get(name), parameter.detach()) for name, parameter in named.items()}
    return weights, sum(p.nbytes / assembly.replicas.num_holders(name) for name, p in named.items())


_ALONE: dict[str, Outcome] = {}


def alone(run: Run, name: str) -> Outcome:
    if name not in _ALONE:
        _ALONE[name] = train_with_each(0, replace(run, strategy=None, world=1), [name])[name]
    return _ALONE[name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_optimizer_gives_the_run_of_one_process_with_states_on_one_rank_each(layout: str, corpus: str) -> None:
    world, strategy = LAYOUTS[layout]
    run = Run(strategy=strategy, world=world, corpus=corpus, steps=STEPS)
    # one that looks at shapes sees the experts of this rank, as it would see those of one layer in one process
    names = list(ELEMENTWISE if "expert_parallel_size" in strategy else OPTIMIZERS)

    results = run_ranks(world, train_with_each, run, names, timeout=240)

    for name in names:
        expected = alone(run, name)
        outcomes = [result[name] for result in results]
        for found in outcomes:
            assert found.losses == pytest.approx(expected.losses, abs=1e-9), name
            assert found.norms == pytest.approx(expected.norms, rel=1e-9), name
            for tensor, (rows, values) in found.weights.items():
                whole = expected.weights[tensor][1]
                mine = whole if rows is None else whole[rows.start : rows.stop]
                torch.testing.assert_close(values, mine, rtol=1e-9, atol=1e-9, msg=f"{name}: {tensor}")
        total = sum(found.state_bytes for found in outcomes)
        assert total == pytest.approx(expected.state_bytes, rel=0.05), name
        if name in ELEMENTWISE:
            per_byte = expected.state_bytes / expected.fair_share
            for found in outcomes:
                assert found.state_bytes == pytest.approx(found.fair_share * per_byte, rel=0.05), name


def bytes_in_bfloat16(rank: int, run: Run) -> tuple[int, int, float]:
    """Of main weights, of the states that belong to them, and of a fair share of all weights in float32."""
    trainer, module, data = build(rank, run)
    make = MethodType(lambda self: OPTIMIZERS["AdamW"](self.parameters()), module)
    module.configure_optimizers = make  # type: ignore[method-assign]
    trainer.fit(module, data)
    assert isinstance(trainer.strategy, DualPipeStrategy) and trainer.strategy.assembly is not None
    assembly, states = trainer.strategy.assembly, trainer.optimizers[0].state
    assert {weight.dtype for weight in states} == {torch.float32}
    named = assembly.named_parameters()
    assert {parameter.dtype for parameter in named.values()} == {torch.bfloat16}
    share = sum(4 * p.numel() / assembly.replicas.num_holders(name) for name, p in named.items())
    moments = [value for state in states.values() for value in state.values() if value.ndim]
    return sum(weight.nbytes for weight in states), sum(value.nbytes for value in moments), share


@pytest.mark.parametrize("layout", ["dualpipe pp2 dp2", "pp1 ep4"])
def test_main_weights_are_on_one_rank_each_like_the_states_that_belong_to_them(layout: str, corpus: str) -> None:
    world, strategy = LAYOUTS[layout]
    run = Run(strategy=strategy, world=world, corpus=corpus, steps=2, precision="bf16-true")

    found = run_ranks(world, bytes_in_bfloat16, run, timeout=240)

    whole = sum(4 * parameter.numel() for parameter in build_module(run).parameters())
    assert sum(mains for mains, _, _ in found) == whole
    for mains, moments, share in found:
        assert mains == pytest.approx(share, rel=0.05)
        assert moments == 2 * mains
