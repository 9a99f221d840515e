"""Every schedule, on one, two and four ranks, gives the sums and gradients of the uncut model.

Pieces of a batch are uneven and some are empty, three tensors cross every cut, and batches change
their size from step to step. float64; 1e-12 leaves room for another order of additions only.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import TensorSpec, as_layers, means
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.microbatches import split
from lightning_dualpipe.schedules import SCHEDULES
from tests.pipeline.small import (
    CLASSES,
    WIDTH,
    Ladder,
    build_batch,
    build_engine,
    gradients_of,
    parameters_of,
    uncut_gradients,
    without_labels,
)
from tests.ranks import run_ranks

STEPS = [(16, 8), (5, 5), (3, 4), (18, 7), (16, 8)]  # samples, microbatches: even, few, one empty, uneven, again


def sums_and_gradients(engine: Engine) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """By step: what this rank reports, and the gradients of its parameters."""
    found = []
    for step, (samples, num_microbatches) in enumerate(STEPS):
        for parameter in parameters_of(engine).values():
            parameter.grad = None
        sums = engine.train(split(build_batch(samples, seed=step), num_microbatches))
        found.append((sums, gradients_of(engine)))
    return found


def on_rank(rank: int, num_ranks: int, schedules: list[str], prepare: Callable[[], None]) -> dict[str, Any]:
    prepare()
    group = dist.new_group()
    results: dict[str, Any] = {}
    for schedule in schedules:
        engine = build_engine(Ladder(), schedule, num_ranks, rank=rank, group=group)
        trained = sums_and_gradients(engine)
        pieces = split(build_batch(7, seed=9), 3)
        evaluated = engine.evaluate(pieces)
        predicted = engine.predict([without_labels(piece) for piece in pieces])
        assert all(engine.owner_of_output(index, 3) == rank for index in predicted)
        assert not any(stage.num_held or len(stage.weight_gradients) for stage in engine.stages.values())
        results[schedule] = trained, evaluated, predicted, sorted(parameters_of(engine))
    return results


def by_order_alone() -> None:
    """What NCCL asks for: one batch at a time, matched without tags, and nobody leaves one before it is done."""
    batch = dist.batch_isend_irecv

    def blocking(operations: list[dist.P2POp]) -> list[dist.Work]:
        assert operations and all(operation.tag == 0 for operation in operations)
        for work in batch(operations):
            work.wait()
        return []

    dist.batch_isend_irecv, dist.get_backend = blocking, lambda group=None: "nccl"  # type: ignore[assignment, return-value]


def by_tags() -> None:
    """As gloo is."""


RUNS: dict[str, tuple[int, Callable[[], None]]] = {
    "one rank": (1, by_tags),
    "two ranks": (2, by_tags),
    "four ranks": (4, by_tags),
    "four ranks, matched by order alone": (4, by_order_alone),
}
CASES = [(run, schedule) for run in RUNS for schedule in SCHEDULES if (run, schedule) != ("one rank", "dualpipe")]
_RESULTS: dict[str, list[dict[str, Any]]] = {}


def results_of(run: str, schedule: str) -> list[Any]:
    """By rank. All schedules of a run share their processes."""
    if run not in _RESULTS:
        num_ranks, prepare = RUNS[run]
        schedules = [schedule for each, schedule in CASES if each == run]
        _RESULTS[run] = run_ranks(num_ranks, on_rank, num_ranks, schedules, prepare)
    return [rank[schedule] for rank in _RESULTS[run]]


def added(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


@pytest.mark.parametrize(("run", "schedule"), CASES)
def test_training_gives_the_sums_and_gradients_of_the_uncut_model(run: str, schedule: str) -> None:
    ranks = results_of(run, schedule)
    for step, (samples, num_microbatches) in enumerate(STEPS):
        expected, gradients = uncut_gradients(Ladder(), build_batch(samples, seed=step))
        sums = added([trained[step][0] for trained, *_ in ranks])
        found = added([trained[step][1] for trained, *_ in ranks])  # copies of a stage add up

        where = f"{samples} samples in {num_microbatches} microbatches"
        assert set(sums) == set(expected)
        for name, value in means(sums).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=f"{name}, {where}")
        assert set(found) == set(gradients)
        for name, gradient in gradients.items():
            want = gradient * sums["tokens"]
            torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12, msg=f"{name}, {where}")


@pytest.mark.parametrize(("run", "schedule"), CASES)
def test_evaluation_and_prediction_are_those_of_the_uncut_model(run: str, schedule: str) -> None:
    batch = build_batch(7, seed=9)
    ranks = results_of(run, schedule)
    expected = Ladder()(batch)
    for name, value in means(added([evaluated for _, evaluated, *_ in ranks])).items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-12, atol=1e-12, msg=name)

    outputs: dict[int, Tensor] = {}
    for _, _, predicted, _ in ranks:
        assert not outputs.keys() & predicted.keys()
        outputs |= predicted
    logits = torch.cat([outputs[index] for index in range(3)])
    torch.testing.assert_close(logits, Ladder()(without_labels(batch)).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("run", "schedule"), CASES)
def test_a_rank_has_gradients_of_its_stages_and_of_nothing_else(run: str, schedule: str) -> None:
    ranks = results_of(run, schedule)
    for trained, _, _, mine in ranks:
        assert sorted(trained[0][1]) == mine
    assert set().union(*(mine for *_, mine in ranks)) == set(dict(Ladder().named_parameters()))


# ---- one process is enough: on one rank, dualpipev has two stages --------------------------------


def folded(model: Ladder, **options: Any) -> Engine:
    return build_engine(model, "dualpipev", 1, **options)


def test_gradients_are_added_to_those_that_are_there() -> None:
    engine = folded(Ladder())
    pieces = split(build_batch(8), 4)
    engine.train(pieces)
    once = {name: gradient.clone() for name, gradient in gradients_of(engine).items()}
    engine.train(pieces)
    for name, gradient in gradients_of(engine).items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_most_microbatches_held_at_once_are_counted_anew_in_each_step() -> None:
    engine = build_engine(Ladder(), "gpipe", 1)
    for num_microbatches in (6, 2):
        engine.train(split(build_batch(6), num_microbatches))
        assert engine.peak_held == num_microbatches
    engine.evaluate(split(build_batch(6), 4))
    assert engine.peak_held == 2


def failing_in(phase: str) -> Ladder:
    model = Ladder()

    def fail(*_: object) -> None:
        raise ArithmeticError("not today")

    rung = model.rungs[-1]  # in the second of two stages
    if phase == "backward":
        rung.register_full_backward_pre_hook(fail)
    else:
        rung.register_forward_pre_hook(fail)
    return model


@pytest.mark.parametrize(("phase", "action"), [("forward", "1F0"), ("backward", "1[BI]0")])
def test_an_exception_tells_which_action_ran(phase: str, action: str) -> None:
    engine = folded(failing_in(phase))
    with pytest.raises(ArithmeticError, match="not today") as caught:
        engine.train(split(build_batch(8), 4))
    (note,) = caught.value.__notes__
    assert re.fullmatch(rf"while pipeline rank 0 ran {action} \(stage, kind, microbatch\)", note)


class Declares(Ladder):
    """Says something of its boundary that need not be so."""

    def __init__(self, specs: Callable[[int], Sequence[TensorSpec]], **options: Any) -> None:
        super().__init__(**options)
        self.specs = specs

    def boundary(self, batch: Mapping[str, Tensor]) -> Sequence[TensorSpec]:
        return self.specs(len(batch["x"]))


F64, I64 = torch.float64, torch.int64
WRONG = {
    "too few": lambda n: [TensorSpec((n, WIDTH)), TensorSpec((n,), I64)],
    "too many": lambda n: [TensorSpec((n, WIDTH)), TensorSpec((n,), I64), TensorSpec((n,)), TensorSpec((n,))],
    "a shape": lambda n: [TensorSpec((n, WIDTH + 1)), TensorSpec((n,), I64), TensorSpec((n,))],
    "no integers": lambda n: [TensorSpec((n, WIDTH)), TensorSpec((n,), torch.int32), TensorSpec((n,))],
    "a narrow format": lambda n: [TensorSpec((n, WIDTH), torch.bfloat16), TensorSpec((n,), I64), TensorSpec((n,))],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("what", ["train", "evaluate", "predict"])
def test_a_boundary_that_is_not_as_declared_is_refused_with_both_written_out(wrong: str, what: str) -> None:
    engine = folded(Declares(WRONG[wrong]))
    batch = build_batch(4)
    with pytest.raises(ConfigurationError) as caught:
        getattr(engine, what)([batch if what != "predict" else without_labels(batch)])
    message = str(caught.value)
    assert message.startswith("Declares.boundary(batch) declares ")
    assert "layer '4 (Rung)' returns float64 [4, 6], int64 [4], float64 [4]; declare what crosses" in message


def test_a_wire_of_16_bits_refuses_outputs_of_32() -> None:
    engine = folded(Ladder(dtype=torch.float32), dtype=torch.bfloat16)
    with pytest.raises(
        ConfigurationError, match=r"declares bfloat16 \[4, 6\].*returns float32 \[4, 6\].*not torch.bfloat16"
    ):
        engine.train([build_batch(4, dtype=torch.float32)])


def test_a_wire_of_32_bits_widens_outputs_of_16_and_narrows_their_gradients() -> None:
    model, batch = Ladder(dtype=torch.float32), build_batch(6, dtype=torch.bfloat16)
    engine = folded(model, dtype=torch.float32)
    num_narrow = len(engine.stages[0].layers)
    model.rungs[:num_narrow].bfloat16()
    sums = engine.train(split(batch, 1))
    found = gradients_of(engine)

    expected = Ladder(dtype=torch.float32)
    expected.rungs[:num_narrow].bfloat16()
    values: Any = expected.inputs(batch)
    for index, layer in enumerate(as_layers(expected.layers())):
        if index == num_narrow:
            values = tuple(value.float() if value.is_floating_point() else value for value in values)
        values = layer(values, batch)
    loss = expected.loss(values, batch)["loss"]
    loss.backward()
    assert torch.equal(sums["loss"], loss.detach())
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None
        assert found[name].dtype == parameter.dtype and torch.equal(found[name], parameter.grad), name


def test_under_autocast_the_wire_keeps_the_format_of_the_parameters() -> None:
    engine = folded(
        Ladder(dtype=torch.float32), dtype=torch.float32, context=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    batch = build_batch(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = Ladder(dtype=torch.float32)(batch)["loss"]
    loss = means(engine.train(split(batch, 1)))["loss"]
    torch.testing.assert_close(loss, expected.detach())
    assert all(gradient.dtype == torch.float32 for gradient in gradients_of(engine).values())


class Reports(Ladder):
    """Sums of different kinds."""

    def loss(self, values: tuple[Tensor, Tensor], batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        sums = super().loss(values, batch)
        return {**sums, "per class": F.one_hot(batch["labels"].clamp(min=0), CLASSES).sum(0)}


def test_sums_that_a_model_adds_are_added_up_over_microbatches() -> None:
    batch = build_batch(11)
    sums = folded(Reports()).train(split(batch, 4))
    assert torch.equal(sums["per class"], torch.bincount(batch["labels"].clamp(min=0), minlength=CLASSES))
    assert sums["tokens"] == (batch["labels"] != -100).sum()
