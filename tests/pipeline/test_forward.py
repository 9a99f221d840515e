"""What a user sees of a pipeline: a call that returns means, and a loss whose ``backward`` hands over gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Batch
from lightning_dualpipe.parallel.early_sums import GradientSums
from lightning_dualpipe.parallel.groups import Groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from lightning_dualpipe.pipeline.engine import Engine
from lightning_dualpipe.pipeline.forward import PipelinedForward
from tests.pipeline.small import (
    CPU,
    Ladder,
    build_batch,
    build_engine,
    parameters_of,
    uncut_gradients,
    without_labels,
)
from tests.ranks import run_ranks

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def pipelined(model: Ladder, *, num_microbatches: Any = 4, **options: Any) -> Callable[[Any], Any]:
    """On one rank, in two stages."""
    engine = build_engine(model, "dualpipev", 1, **options)
    named = parameters_of(engine)
    return PipelinedForward(
        engine, lambda: named, unsummed(named), num_ranks=1, num_microbatches=num_microbatches, device=CPU
    )


def unsummed(named: Mapping[str, nn.Parameter], rank: int = 0) -> GradientSums:
    """As if nobody else held the parameters."""
    replicas = ReplicaGroups(dict.fromkeys(named, (rank,)), rank=rank)
    return GradientSums(replicas, lambda: named, dict.fromkeys(named, (0,)), here=(0,))


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, **EXACT, msg=name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- the loss -----------------------------------------------------------------------------------


def test_a_call_returns_the_means_of_the_uncut_model_and_backward_its_gradients() -> None:
    model, batch = Ladder(), build_batch(8)
    means, expected = uncut_gradients(Ladder(), batch)
    out = pipelined(model)(batch)
    assert_equal({name: value.detach() for name, value in out.items()}, means)
    assert out["loss"].shape == () and out["loss"].requires_grad
    assert not gradients(model)  # not before they are asked for

    out["loss"].backward()
    assert_equal(gradients(model), expected)


USES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {  # what becomes of the loss -> times what is its gradient
    "divided, for accumulation": (0.25, lambda loss: loss / 4),
    "weighted and added to": (3.0, lambda loss: 3 * loss + 7),
    "squared": (2.0, lambda loss: loss.square() / loss.detach()),
    "not used": (0.0, lambda loss: 0 * loss),
    "negated": (-1.0, lambda loss: -loss),
}


@pytest.mark.parametrize("use", USES)
def test_gradients_follow_whatever_is_done_to_the_loss(use: str) -> None:
    factor, function = USES[use]
    model, batch = Ladder(), build_batch(8)
    function(pipelined(model)(batch)["loss"]).backward()
    _, expected = uncut_gradients(Ladder(), batch)
    assert_equal(gradients(model), {name: factor * gradient for name, gradient in expected.items()})


def test_losses_of_several_calls_can_be_added_up() -> None:
    model, batches = Ladder(), [build_batch(8, seed=seed) for seed in range(3)]
    forward = pipelined(model)
    sum(weight * forward(batch)["loss"] for weight, batch in enumerate(batches, start=1)).backward()

    each = [uncut_gradients(Ladder(), batch)[1] for batch in batches]
    assert_equal(gradients(model), {name: each[0][name] + 2 * each[1][name] + 3 * each[2][name] for name in each[0]})


def test_a_loss_of_the_user_s_own_is_added_as_usual() -> None:
    model, batch = Ladder(), build_batch(8)
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    (pipelined(model)(batch)["loss"] + 0.5 * penalty).backward()
    _, expected = uncut_gradients(Ladder(), batch)
    assert_equal(gradients(model), {name: expected[name] + p.detach() for name, p in model.named_parameters()})


def test_gradients_that_are_there_are_added_to() -> None:
    model, batch = Ladder(), build_batch(8)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = gradients(model)
    loss = pipelined(model)(batch)["loss"]
    assert all(parameter.grad is before[name] for name, parameter in model.named_parameters())  # as they were
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in before.values())

    loss.backward()
    _, expected = uncut_gradients(Ladder(), batch)
    assert_equal(gradients(model), {name: gradient + 1 for name, gradient in expected.items()})


@pytest.mark.parametrize("name", ["head.weight", "rungs.0.norm.weight", "rungs.8.up.weight"])
def test_hooks_of_a_parameter_run_once_when_its_gradient_is_delivered(name: str) -> None:
    model, batch, seen = Ladder(), build_batch(8), []
    parameter = model.get_parameter(name)

    def tripled(gradient: Tensor) -> Tensor:
        seen.append("hook")
        return 3 * gradient

    handle = parameter.register_hook(tripled)
    parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    forward = pipelined(model)
    loss = forward(batch)["loss"]
    assert not seen
    loss.backward()
    assert seen == ["hook", "accumulated"]
    _, expected = uncut_gradients(Ladder(), batch)
    assert_equal(gradients(model), {**expected, name: 3 * expected[name]})

    handle.remove()
    model.zero_grad()
    forward(batch)["loss"].backward()
    assert seen == ["hook", "accumulated", "accumulated"]
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("run", [Ladder.forward, lambda model, batch: pipelined(model)(batch)], ids=["uncut", "cut"])
def test_a_backward_through_anything_but_the_loss_is_refused(run: Callable[[Ladder, Batch], dict[str, Tensor]]) -> None:
    out = run(Ladder(), build_batch(8))
    out["penalty"] *= 2
    with pytest.raises(ConfigurationError, match=r"reaches 'penalty', .* only 'loss' carries gradients; add the term"):
        (out["loss"] + out["penalty"]).backward()

    with torch.no_grad():
        assert not run(Ladder(), build_batch(8))["penalty"].requires_grad


def test_a_second_backward_is_refused_with_what_to_do_instead() -> None:
    loss = pipelined(Ladder())(build_batch(8))["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward was called twice .* Add up the losses first, or call the model"):
        loss.backward()


def test_what_is_frozen_stays_without_gradient() -> None:
    model, batch = Ladder(), build_batch(8)
    model.rungs[:5].requires_grad_(False)
    pipelined(model)(batch)["loss"].backward()
    _, expected = uncut_gradients(Ladder(), batch)
    frozen = tuple(f"rungs.{index}." for index in range(5))
    assert_equal(gradients(model), {name: g for name, g in expected.items() if not name.startswith(frozen)})


def test_a_rank_without_trained_parameters_can_call_backward_too() -> None:
    model = Ladder().requires_grad_(False)
    loss = pipelined(model)(build_batch(8))["loss"]
    loss.backward()
    assert not gradients(model)


def test_a_batch_without_a_single_label_has_loss_zero_and_gradients_zero() -> None:
    model, batch = Ladder(), build_batch(8)
    batch["labels"].fill_(-100)
    with torch.no_grad():
        batch["x"].zero_()
    out = pipelined(model)(batch)
    out["loss"].backward()
    assert out["tokens"] == 0 and all(gradient.isfinite().all() for gradient in gradients(model).values())


# ---- evaluation, prediction ---------------------------------------------------------------------


def test_without_gradients_only_forwards_run() -> None:
    model, batch = Ladder(), build_batch(7)
    means, _ = uncut_gradients(Ladder(), batch)
    with torch.no_grad():
        out = pipelined(model)(batch)
    assert_equal(out, means)
    assert not out["loss"].requires_grad and not gradients(model)


def test_without_labels_the_prediction_comes_back_in_the_order_of_the_batch() -> None:
    batch = without_labels(build_batch(7))
    out = pipelined(Ladder())(batch)
    torch.testing.assert_close(out, Ladder()(batch).detach(), **EXACT)
    assert not out.requires_grad


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.float32, torch.float32)])
def test_reported_means_have_the_format_of_the_wire_and_counts_stay_exact(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    out = pipelined(Ladder(dtype=dtype), dtype=dtype)(build_batch(8, dtype=dtype))
    assert {name: value.dtype for name, value in out.items() if name != "tokens"} == dict.fromkeys(
        ("loss", "hits", "penalty"), expected
    )
    assert out["tokens"].dtype == torch.float64  # 2^24 tokens are counted, too


# ---- microbatches -------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [10, 2])
def test_batches_that_do_not_split_evenly_are_refused_in_training(samples: int) -> None:
    forward = pipelined(Ladder())
    forward(build_batch(samples))  # the first may be the last of its epoch, where a run is resumed
    message = rf"{samples} samples .* num_microbatches=4 equal parts; .* multiple of 4, or"
    with pytest.raises(ConfigurationError, match=message):
        forward(build_batch(samples))


def test_a_run_may_be_resumed_at_the_smaller_batch_that_ends_an_epoch() -> None:
    forward = pipelined(Ladder())
    for samples in (3, 8, 8, 3, 8):
        forward(build_batch(samples))


def test_the_last_batch_of_an_epoch_may_be_smaller() -> None:
    model = Ladder()
    forward = pipelined(model)
    forward(build_batch(8))
    for samples in (7, 3, 1):
        model.zero_grad()
        batch = build_batch(samples, seed=samples)
        means, expected = uncut_gradients(Ladder(), batch)
        out = forward(batch)
        out["loss"].backward()
        assert_equal({name: value.detach() for name, value in out.items()}, means)
        assert_equal(gradients(model), expected)


def test_evaluation_and_prediction_take_any_size_at_any_time() -> None:
    forward = pipelined(Ladder())
    for samples in (3, 10, 1):
        batch = build_batch(samples)
        means, _ = uncut_gradients(Ladder(), batch)
        with torch.no_grad():
            assert_equal(forward(batch), means)
        assert len(forward(without_labels(batch))) == samples
    forward(build_batch(8))
    with pytest.raises(ConfigurationError, match="10 samples"):  # and training is as strict as before
        forward(build_batch(10))


def test_an_empty_batch_is_a_step_without_effect() -> None:
    model = Ladder()
    out = pipelined(model, num_microbatches="auto")(build_batch(0))
    assert out["loss"] == 0 and out["tokens"] == 0
    out["loss"].backward()
    assert not any(gradient.any() for gradient in gradients(model).values())
    assert pipelined(model)(without_labels(build_batch(0))).shape == (0, 5)


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="named tensors, got Tensor"):
        pipelined(Ladder())(torch.zeros(3))


class ChangesItsMind(Ladder):
    """Reports something in some batches only."""

    def loss(self, values: tuple[Tensor, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        sums = dict(super().loss(values, batch))
        if len(batch["x"]) == 1:
            sums["rare"] = sums["hits"]
        return sums


def test_what_a_model_reports_is_settled_in_the_first_step() -> None:
    forward = pipelined(ChangesItsMind())
    forward(build_batch(8))
    with pytest.raises(ConfigurationError, match=r"ChangesItsMind\.loss reports 'rare', .*hits, loss, penalty, tokens"):
        forward(build_batch(4))


# ---- several ranks ------------------------------------------------------------------------------

LAYOUTS = {  # schedule, pipeline ranks x data ranks, whether data ranks agree on the number of microbatches
    "dualpipe over 4 ranks": ("dualpipe", 4, 1, False),
    "1f1b over 2 x 2": ("1f1b", 2, 2, False),
    "dualpipe over 2 x 2 that exchange tokens": ("dualpipe", 2, 2, True),
}
SAMPLES = {1: [11], 2: [8, 3]}  # of each data rank


def on_rank(rank: int, schedule: str, num_pipeline: int, num_data: int, agree: bool) -> dict[str, Any]:
    layout = ParallelLayout(num_pipeline * num_data, pipeline=num_pipeline)
    groups = Groups.create(layout, rank)
    engine: Engine = build_engine(
        Ladder(), schedule, num_pipeline, rank=layout.pipeline_rank(rank), group=groups.pipeline
    )
    forward: Callable[[Any], Any] = PipelinedForward(
        engine,
        lambda: parameters_of(engine),
        unsummed(parameters_of(engine), rank),
        num_ranks=num_pipeline,
        num_microbatches="auto",
        device=CPU,
        pipeline=groups.pipeline_broadcast,
        data=groups.data_host if agree else None,
        world=groups.world,
    )
    share = SAMPLES[num_data]
    start = sum(share[: layout.data_rank(rank)])
    mine = {name: value[start : start + share[layout.data_rank(rank)]] for name, value in build_batch(11).items()}
    trained = forward(mine)
    trained["loss"].backward()
    with torch.no_grad():
        evaluated = forward(mine)
    return {
        "trained": {name: value.detach() for name, value in trained.items()},
        "evaluated": evaluated,
        "predicted": forward(without_labels(mine)),
        "gradients": {name: p.grad for name, p in parameters_of(engine).items() if p.grad is not None},
        "data rank": layout.data_rank(rank),
        "peak": engine.peak_held,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_see_the_means_of_the_global_batch_and_share_out_its_gradients(layout: str) -> None:
    schedule, num_pipeline, num_data, agree = LAYOUTS[layout]
    ranks = run_ranks(num_pipeline * num_data, on_rank, schedule, num_pipeline, num_data, agree)

    batch = build_batch(11)
    means, expected = uncut_gradients(Ladder(), batch)
    prediction = Ladder()(without_labels(batch)).detach().split(SAMPLES[num_data])
    total: dict[str, Tensor] = {}
    for rank in ranks:
        assert_equal(rank["trained"], means)
        assert_equal(rank["evaluated"], means)
        torch.testing.assert_close(rank["predicted"], prediction[rank["data rank"]], **EXACT)
        for name, gradient in rank["gradients"].items():
            total[name] = total.get(name, 0) + gradient
    assert_equal(total, expected)
