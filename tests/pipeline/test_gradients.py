"""Every gradient of a pipelined DeepSeek-V3 is that of the uncut model, under every schedule and launch order.

float64; 1e-10 of each parameter's largest gradient leaves room for another order of additions only.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.recompute import Recompute
from lightning_dualpipe.interface import Batch
from lightning_dualpipe.parallel.groups import Groups
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.pipeline.overlap import ORDERS
from lightning_dualpipe.schedules import SCHEDULES, build_schedule, simulate
from lightning_dualpipe.strategy.assembly import Assembly
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE

CONFIG = DeepSeekV3Config.from_preset("tiny", **{**SHAPE, "num_nextn_predict_layers": 2})  # type: ignore[typeddict-item]


AFTER_SOME_TRAINING = (0.1, -0.1, -0.03, 0.03)
STARVING_RANK_1 = (9.0, 9.0, 0.0, 0.0)  # of two expert ranks


def build(bias: Sequence[float] = AFTER_SOME_TRAINING, recompute: Recompute = "none") -> nn.Module:
    owner = nn.Module()
    owner.model = Transformer(CONFIG, seed=1, recompute=recompute).double()
    for _, router in owner.model.routers():
        router.e_score_correction_bias.copy_(torch.tensor(bias))
    return owner


def build_batch(samples: int) -> Batch:
    tokens = torch.randint(CONFIG.vocab_size, (samples, 13), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100  # sequences have different numbers of labels
    return {"input_ids": tokens[:, :-1], "labels": labels}


def uncut(samples: int, bias: Sequence[float]) -> tuple[float, dict[str, Tensor], list[list[int]]]:
    owner = build(bias)
    out = owner.model(build_batch(samples))
    out["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in owner.named_parameters()}
    return out["loss"].item(), gradients, [router.tokens_per_expert.tolist() for _, router in owner.model.routers()]


def cut(
    rank: int,
    schedule: str,
    layout: ParallelLayout,
    samples: int,
    num_microbatches: int,
    order: str | None = "eager",
    bias: Sequence[float] = AFTER_SOME_TRAINING,
    dispatcher: str = "auto",
    recompute: Recompute = "none",
) -> tuple[float, Mapping[str, tuple[range | None, Tensor]], int, list[list[int]]]:
    owner = build(bias, recompute)
    assembly = Assembly(
        owner,
        layout,
        Groups.create(layout, rank),
        rank=rank,
        schedule=schedule,
        num_microbatches=num_microbatches,
        order=None if order is None else ORDERS[order],
        device=torch.device("cpu"),
        context=nullcontext,
        main_gradients=False,
        convert=lambda module: module,
        dispatcher=dispatcher,
        dtype=torch.float64,
    )
    assembly.attach()
    whole, share = build_batch(samples), samples // layout.data
    mine = slice(layout.data_rank(rank) * share, (layout.data_rank(rank) + 1) * share)
    out = owner.model({name: value[mine] for name, value in whole.items()})
    out["loss"].backward()  # summed over all who hold the parameter
    gradients = {name: (assembly.rows.get(name), p.grad) for name, p in assembly.named_parameters().items()}
    counts = [router.tokens_per_expert.tolist() for _, router in owner.model.routers()]
    return out["loss"].item(), gradients, assembly.peak_held, counts


CASES = [
    *((schedule, 4, 1, 8) for schedule in SCHEDULES),
    ("dualpipe", 2, 1, 4),
    ("dualpipev", 2, 1, 3),
    ("dualpipe", 4, 1, 7),
    ("dualpipe", 2, 2, 4),
    ("zb1p", 2, 2, 3),
]


@pytest.mark.parametrize(("schedule", "pipeline", "expert", "num_microbatches"), CASES)
def test_gradients_are_those_of_the_uncut_model(
    schedule: str, pipeline: int, expert: int, num_microbatches: int
) -> None:
    check(schedule, pipeline, expert, num_microbatches)


@pytest.mark.parametrize("bias", [AFTER_SOME_TRAINING, STARVING_RANK_1], ids=["uneven", "starved"])
@pytest.mark.parametrize("order", [*ORDERS, None])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_in_whatever_order_a_pair_is_launched(schedule: str, order: str | None, bias: Sequence[float]) -> None:
    """None: nothing overlaps."""
    check(schedule, 2, 2, 6, order=order, bias=bias, dispatcher="all_to_all")


@pytest.mark.parametrize("bias", [AFTER_SOME_TRAINING, STARVING_RANK_1], ids=["uneven", "starved"])
@pytest.mark.parametrize("order", [*ORDERS, None])
@pytest.mark.parametrize(("pipeline", "expert", "per_node"), [(1, 4, 2), (2, 2, 1), (2, 2, 2)])
def test_tokens_that_cross_to_each_node_once(
    pipeline: int, expert: int, per_node: int, order: str | None, bias: Sequence[float]
) -> None:
    check("dualpipe", pipeline, expert, 6, order=order, bias=bias, dispatcher="node", per_node=per_node)


def check(
    schedule: str,
    pipeline: int,
    expert: int,
    num_microbatches: int,
    *,
    order: str | None = "eager",
    bias: Sequence[float] = AFTER_SOME_TRAINING,
    dispatcher: str = "auto",
    per_node: int | None = None,
) -> None:
    layout = ParallelLayout(pipeline * expert, pipeline=pipeline, expert=expert, per_node=per_node)
    samples = num_microbatches * expert
    loss, expected, counts = uncut(samples, bias)
    assert (bias is STARVING_RANK_1) == (not any(sum(each[2:]) for each in counts))

    results = run_ranks(layout.world, cut, schedule, layout, samples, num_microbatches, order, bias, dispatcher)

    seen = {name: torch.zeros(len(gradient), dtype=torch.bool) for name, gradient in expected.items()}
    for rank_loss, gradients, *_ in results:
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        for name, (rows, gradient) in gradients.items():
            rows = rows or range(len(expected[name]))
            want = expected[name][rows.start : rows.stop]
            scale = expected[name].abs().max().clamp(min=1e-30)
            torch.testing.assert_close(gradient / scale, want / scale, rtol=0, atol=1e-10, msg=name)
            seen[name][rows.start : rows.stop] = True
    assert all(rows.all() for rows in seen.values()), "some parameter is on no rank"


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_recomputing_changes_no_bit_though_weight_gradients_wait_and_experts_are_spread(schedule: str) -> None:
    layout = ParallelLayout(4, pipeline=2, expert=2)
    want, *others = (
        run_ranks(layout.world, cut, schedule, layout, 8, 4, "eager", AFTER_SOME_TRAINING, "auto", recompute)
        for recompute in ("none", "selective", "full")
    )
    for results in others:
        for (loss, gradients, _, counts), (expected_loss, expected, _, expected_counts) in zip(
            results, want, strict=True
        ):
            assert loss == expected_loss and counts == expected_counts and gradients.keys() == expected.keys()
            assert all(torch.equal(gradient, expected[name][1]) for name, (_, gradient) in gradients.items())


@pytest.mark.parametrize(
    ("schedule", "highest"), [("dualpipe", 5), ("dualpipev", 9), ("zb1p", 4), ("1f1b", 4), ("gpipe", 8)]
)
def test_no_rank_holds_more_microbatches_than_the_simulation_says(schedule: str, highest: int) -> None:
    """P + 1 for DualPipe, 2P + 1 of half stages for DualPipeV, P for 1F1B and ZB1P, all for GPipe (DeepSeek's table).

    Some hold less: without traffic the backward of a pair ends before its forward begins.
    """
    results = run_ranks(4, cut, schedule, ParallelLayout(4, pipeline=4), 8, 8)
    peaks, simulated = [peak for _, _, peak, _ in results], simulate(build_schedule(schedule, 4, 8)).peak
    assert all(peak <= most for peak, most in zip(peaks, simulated, strict=True)) and max(peaks) == highest


@pytest.mark.parametrize(("schedule", "expected"), [("dualpipe", 3), ("dualpipev", 5)])
def test_a_pair_that_overlaps_holds_both_of_its_microbatches(schedule: str, expected: int) -> None:
    results = run_ranks(4, cut, schedule, ParallelLayout(4, pipeline=2, expert=2), 16, 8)
    assert [peak for _, _, peak, _ in results] == [expected] * 4 == [*simulate(build_schedule(schedule, 2, 8)).peak] * 2
