"""Every gradient of a pipelined DeepSeek-V3 is that of the uncut model, under every schedule and launch order.

float64; 1e-10 of each parameter's largest gradient leaves room for another order of additions only.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

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
from tests.ranks import Cases
from tests.strategy.runs import SHAPE

CONFIG = DeepSeekV3Config.from_preset("tiny", **{**SHAPE, "num_nextn_predict_layers": 2})  # type: ignore[typeddict-item]
BIASES = {  # of routers
    "uneven": (0.1, -0.1, -0.03, 0.03),  # as after some training
    "starved": (9.0, 9.0, 0.0, 0.0),  # rank 1 of two expert ranks gets nothing
}


class Case(NamedTuple):
    schedule: str
    pipeline: int
    expert: int
    num_microbatches: int
    order: str | None = "eager"  # None: nothing overlaps
    bias: str = "uneven"
    dispatcher: str = "auto"
    per_node: int | None = None
    recompute: Recompute = "none"

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(
            self.pipeline * self.expert, pipeline=self.pipeline, expert=self.expert, per_node=self.per_node
        )

    @property
    def samples(self) -> int:
        return self.num_microbatches * self.expert

    def __str__(self) -> str:
        return "-".join(map(str, self))


PLAIN = [
    *(Case(schedule, 4, 1, 8) for schedule in SCHEDULES),
    Case("dualpipe", 2, 1, 4),
    Case("dualpipev", 2, 1, 3),
    Case("dualpipe", 4, 1, 7),
    Case("dualpipe", 2, 2, 4),
    Case("zb1p", 2, 2, 3),
]
IN_ANY_ORDER = [  # with two or more pairs on every rank
    Case(schedule, 2, 2, num_microbatches, order, bias, "all_to_all")
    for schedule, num_microbatches in (("dualpipe", 5), ("dualpipev", 4))
    for order in (*ORDERS, None)
    for bias in BIASES
]
ACROSS_NODES = [
    Case("dualpipe", pipeline, expert, num_microbatches, order, bias, "node", per_node)
    for pipeline, expert, per_node, num_microbatches in ((1, 4, 2, 4), (2, 2, 1, 5), (2, 2, 2, 5))
    for order in (*ORDERS, None)
    for bias in BIASES
]
RECOMPUTED = [
    Case(schedule, 2, 2, 4, recompute=recompute)
    for schedule in ("dualpipe", "zb1p")
    for recompute in ("none", "selective", "full")
]
LONG = [Case(schedule, 2, 2, 8) for schedule in ("dualpipe", "dualpipev")]


def build(bias: str = "uneven", recompute: Recompute = "none") -> nn.Module:
    owner = nn.Module()
    owner.model = Transformer(CONFIG, seed=1, recompute=recompute).double()
    for _, router in owner.model.routers():
        router.e_score_correction_bias.copy_(torch.tensor(BIASES[bias]))
    return owner


def build_batch(samples: int) -> Batch:
    tokens = torch.randint(CONFIG.vocab_size, (samples, 13), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100  # sequences have different numbers of labels
    return {"input_ids": tokens[:, :-1], "labels": labels}


@cache
def uncut(samples: int, bias: str) -> tuple[float, dict[str, Tensor], list[list[int]]]:
    owner = build(bias)
    out = owner.model(build_batch(samples))
    out["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in owner.named_parameters()}
    return out["loss"].item(), gradients, [router.tokens_per_expert.tolist() for _, router in owner.model.routers()]


def cut(rank: int, case: Case) -> tuple[float, Mapping[str, tuple[range | None, Tensor]], int, list[list[int]]]:
    owner, layout = build(case.bias, case.recompute), case.layout
    assembly = Assembly(
        owner,
        layout,
        Groups.create(layout, rank),
        rank=rank,
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        order=None if case.order is None else ORDERS[case.order],
        device=torch.device("cpu"),
        context=nullcontext,
        main_gradients=False,
        convert=lambda module: module,
        dispatcher=case.dispatcher,
        dtype=torch.float64,
    )
    assembly.attach()
    whole, share = build_batch(case.samples), case.samples // layout.data
    mine = slice(layout.data_rank(rank) * share, (layout.data_rank(rank) + 1) * share)
    out = owner.model({name: value[mine] for name, value in whole.items()})
    out["loss"].backward()  # summed over all who hold the parameter
    # clones: a gradient is a part of a buffer, all of which would be sent with each
    gradients = {name: (assembly.rows.get(name), p.grad.clone()) for name, p in assembly.named_parameters().items()}
    counts = [router.tokens_per_expert.tolist() for _, router in owner.model.routers()]
    return out["loss"].item(), gradients, assembly.peak_held, counts


RESULTS = {
    world: Cases(world, cut, {str(case): (case,) for case in cases if case.layout.world == world})
    for cases in [[*PLAIN, *IN_ANY_ORDER, *ACROSS_NODES, *RECOMPUTED, *LONG]]
    for world in (2, 4)
}


def results_of(case: Case) -> list[Any]:
    return RESULTS[case.layout.world][str(case)]


def check(case: Case) -> None:
    loss, expected, counts = uncut(case.samples, case.bias)
    assert (case.bias == "starved") == (not any(sum(each[2:]) for each in counts))

    seen = {name: torch.zeros(len(gradient), dtype=torch.bool) for name, gradient in expected.items()}
    for rank_loss, gradients, *_ in results_of(case):
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        for name, (rows, gradient) in gradients.items():
            rows = rows or range(len(expected[name]))
            want = expected[name][rows.start : rows.stop]
            scale = expected[name].abs().max().clamp(min=1e-30)
            torch.testing.assert_close(gradient / scale, want / scale, rtol=0, atol=1e-10, msg=name)
            seen[name][rows.start : rows.stop] = True
    assert all(rows.all() for rows in seen.values()), "some parameter is on no rank"


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_gradients_are_those_of_the_uncut_model(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", IN_ANY_ORDER, ids=str)
def test_in_whatever_order_a_pair_is_launched(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", ACROSS_NODES, ids=str)
def test_tokens_that_cross_to_each_node_once(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_recomputing_changes_no_bit_though_weight_gradients_wait_and_experts_are_spread(schedule: str) -> None:
    want, *others = (results_of(case) for case in RECOMPUTED if case.schedule == schedule)
    assert len(others) == 2
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
    results = results_of(Case(schedule, 4, 1, 8))
    peaks, simulated = [peak for _, _, peak, _ in results], simulate(build_schedule(schedule, 4, 8)).peak
    assert all(peak <= most for peak, most in zip(peaks, simulated, strict=True)) and max(peaks) == highest


@pytest.mark.parametrize(("case", "expected"), [*zip(LONG, (3, 5), strict=True)], ids=str)
def test_a_pair_that_overlaps_holds_both_of_its_microbatches(case: Case, expected: int) -> None:
    simulated = simulate(build_schedule(case.schedule, 2, 8)).peak
    assert [peak for _, _, peak, _ in results_of(case)] == [expected] * 4 == [*simulated] * 2
