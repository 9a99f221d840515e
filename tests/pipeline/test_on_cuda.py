"""On a GPU communication has a stream of its own: the same gradients, at once, and no memory taken too early.

Two stages in one process, and tokens that travel to the same rank again, through everything that is there
for others: a collective of one rank, or a copy on the communication stream. On a CPU the same tests run
without streams.

``Troubled`` is what makes races show: at every launch a stream falls behind the host, and on both streams
whatever memory the allocator believes to be free is written over. On a GPU each in a process of its own, since
what goes wrong there can end the whole process.
"""

import json
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.parallel import all_to_all, dispatch
from lightning_dualpipe.parallel.all_to_all import Crossing
from lightning_dualpipe.parallel.dispatch import AllToAllDispatcher, LocalDispatcher
from lightning_dualpipe.parallel.flight import used_here
from lightning_dualpipe.pipeline.microbatches import split
from lightning_dualpipe.pipeline.overlap import ORDERS
from lightning_dualpipe.pipeline.streams import CommunicationStream
from tests.marks import needs_cuda
from tests.pipeline.small import build_engine, gradients_of
from tests.ranks import Cases, run_ranks
from tests.strategy.runs import SHAPE

CUDA = torch.device("cuda", 0)
DEVICES = ["cpu", pytest.param("cuda:0", marks=needs_cuda)]
REPEATS = {"cpu": 2, "cuda:0": 20}
CONFIG = DeepSeekV3Config.from_preset("tiny", **SHAPE)
MICROBATCHES = 4
_ABOUT_A_MILLISECOND = 2_000_000  # cycles of a GPU's clock


@dataclass
class Copied:
    """An ``interface.Flight`` to this very rank: a copy on the stream it is launched from, ``slow`` cycles late."""

    leaving: tuple
    beside: tuple
    slow: int = 0
    arriving: tuple = ()
    arrived: object = None

    def __post_init__(self):
        cuda = self.leaving[0].is_cuda
        if cuda and self.slow:
            torch.cuda._sleep(self.slow)
        self.arriving = tuple(x.clone(memory_format=torch.contiguous_format) for x in self.leaving)
        self.arrived = torch.cuda.current_stream().record_event() if cuda else None

    def land(self):
        if self.arrived is not None:
            torch.cuda.current_stream().wait_event(self.arrived)
        used_here(*self.arriving)
        landed, self.leaving, self.arriving = self.arriving, (), ()
        return *landed, *self.beside

    def back(self, gradients):
        return Copied(tuple(gradients[: -len(self.beside)]), (None,) * len(self.beside), self.slow)


class Loopback(LocalDispatcher):
    """Every expert is here, and tokens travel all the same."""

    crosses_ranks = True
    slow = 0

    def send(self, rows, weights, plan):
        return Copied((rows, weights), (plan,), self.slow)

    def send_back(self, rows, routing):
        return Copied((rows,), (routing,), self.slow)

    sent, sent_back = dispatch.TokenDispatcher.sent, dispatch.TokenDispatcher.sent_back


class Troubled(CommunicationStream):
    """With streams that fall behind the host, and free memory that does not keep its contents."""

    def __init__(self, device):
        super().__init__(device)
        self.device = device

    def mark(self):
        self._trouble(0)
        mark = super().mark()
        self._trouble(2 * _ABOUT_A_MILLISECOND)  # the computation is still busy when others use the memory it freed
        return mark

    @contextmanager
    def after(self, *marks):
        with super().after(*marks):
            self._trouble(_ABOUT_A_MILLISECOND // 4)  # and the communication, when Python has let go of what leaves
            yield
            self._trouble(0)

    def _trouble(self, cycles):
        if self.device.type == "cuda" and cycles:
            torch.cuda._sleep(cycles)
        taken = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in _SIZES]  # all at a time
        for block in taken:
            block.fill_(0xFF)  # not a number, or a count of -1


_SIZES = [512] * 24 + [2048] * 12 + [8192] * 12 + [32768] * 6 + [3 * 2**20]


def dispatcher_of(kind):
    """``num_experts -> TokenDispatcher``; the process group has one rank."""
    return Loopback if kind == "loopback" else partial(AllToAllDispatcher, group=dist.group.WORLD)


def build(device, dtype=torch.float64, *, dispatcher=LocalDispatcher, recompute="none", config=CONFIG):
    with torch.device(device):
        model = Transformer(config, seed=1, recompute=recompute).to(dtype)
    for _, mixture in model.mixtures():
        mixture.use_dispatcher(dispatcher(mixture.num_experts))
    for _, router in model.routers():
        router.e_score_correction_bias.copy_(torch.linspace(0.1, -0.1, router.num_experts))  # uneven
    return model


def build_batch(device, *, config=CONFIG, samples=2 * MICROBATCHES, length=12):
    tokens = torch.randint(config.vocab_size, (samples, length + 1), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    return {"input_ids": tokens[:, :-1].to(device), "labels": labels.to(device)}


def uncut(device, batch):
    """Loss and gradients of a sum over tokens, by name."""
    model = build(device)
    out = model(batch)
    loss = out["loss"] * out["tokens"]
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def train(engine, batch):
    for parameter in engine.model.parameters():
        parameter.grad = None
    return engine.train(split(batch, MICROBATCHES)), gradients_of(engine)


def check_close(found, expected, tolerance):
    """Of each parameter's largest gradient."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max().double().clamp(min=1e-30)
        torch.testing.assert_close(
            found[name].double() / scale, want.double() / scale, rtol=0, atol=tolerance, msg=name
        )


def _train_again_and_again(rank, device, kind, schedule, recompute, order):
    batch = build_batch(device)
    loss, expected = uncut(device, batch)
    model = build(device, dispatcher=dispatcher_of(kind), recompute=recompute)
    order = None if order is None else ORDERS[order]
    at = torch.device(device)
    engine = build_engine(model, schedule, 1, device=at, order=order, stream=Troubled(at))
    assert len(engine.stages) == (2 if schedule == "dualpipev" else 1)
    assert any(stage.communicates for stage in engine.stages.values()) == (order is not None)
    for _ in range(REPEATS[device]):
        sums, gradients = train(engine, batch)
        torch.testing.assert_close(sums["loss"], loss, rtol=1e-12, atol=0)
        check_close(gradients, expected, 1e-10)
        del sums, gradients


TRAINED = [
    (kind, schedule, recompute, order)
    for kind, schedule, recompute in (
        ("loopback", "dualpipev", "none"),
        ("loopback", "zb1p", "selective"),
        ("all_to_all", "dualpipev", "none"),
        ("all_to_all", "dualpipev", "full"),
        ("all_to_all", "zb1p", "none"),
        ("all_to_all", "1f1b", "selective"),
    )
    for order in (*ORDERS, None)
]


def named(*options):
    return "-".join(map(str, options))


ON_CPU = Cases(1, _train_again_and_again, {named(*options): ("cpu", *options) for options in TRAINED}, timeout=240)


@pytest.mark.parametrize("options", TRAINED, ids=lambda options: named(*options))
@pytest.mark.parametrize("device", DEVICES)
def test_every_gradient_is_that_of_the_uncut_model_however_memory_is_reused(device, options):
    """1e-10 of each parameter's largest gradient: another order of additions only."""
    if device == "cpu":
        ON_CPU[named(*options)]
    else:
        run_ranks(1, _train_again_and_again, device, *options, backend="nccl", timeout=240)


def _train_in_half_precision(rank, device, kind, order):
    batch, dtype, at = build_batch(device), torch.bfloat16, torch.device(device)
    model = build(device, dtype, dispatcher=dispatcher_of(kind))
    engine = build_engine(model, "dualpipev", 1, dtype=dtype, device=at, order=ORDERS[order], stream=Troubled(at))
    first = None
    for _ in range(REPEATS[device]):
        sums, gradients = train(engine, batch)
        assert sums["loss"].isfinite() and all(each.isfinite().all() for each in gradients.values())
        first = first or gradients
        check_close(gradients, first, 2e-2)


HALF = [(kind, order) for kind in ("loopback", "all_to_all") for order in ORDERS]
HALF_ON_CPU = Cases(1, _train_in_half_precision, {named(*options): ("cpu", *options) for options in HALF}, timeout=240)


@pytest.mark.parametrize("options", HALF, ids=lambda options: named(*options))
@pytest.mark.parametrize("device", DEVICES)
def test_in_half_precision_every_step_gives_the_same_finite_numbers(device, options):
    """2e-2: on a GPU some sums, of the embedding's gradient for instance, are added up in any order."""
    if device == "cpu":
        HALF_ON_CPU[named(*options)]
    else:
        run_ranks(1, _train_in_half_precision, device, *options, backend="nccl", timeout=240)


# ---- memory -----------------------------------------------------------------------------------


@dataclass
class Told:
    """Whose memory was reported to be used, in place of ``used_here``."""

    addresses: set = field(default_factory=set)

    def __call__(self, *tensors):
        self.addresses |= {tensor.data_ptr() for tensor in tensors}


def _report_memory(rank):
    told = Told()
    with patch.object(all_to_all, "used_here", told), patch.object(dispatch, "used_here", told):
        dispatcher = AllToAllDispatcher(4, dist.group.WORLD)
        packed = dispatcher.pack(torch.randn(5, 8), torch.rand(5, 2), torch.tensor([[0, 1]] * 5))
        rows, weights_R, crossed = dispatcher.send(*packed).land()
        dispatcher.unpack(rows, weights_R, crossed)
    assert {rows.data_ptr(), weights_R.data_ptr(), crossed.arriving_SE.data_ptr()} <= told.addresses


def test_whatever_is_made_where_tokens_are_launched_is_reported_where_they_land():
    """Rows, weights and the others' counts: memory that goes back to its own stream when Python lets go of it."""
    run_ranks(1, _report_memory)


def _send_what_has_to_be_copied(rank):
    spread = torch.ones(1, 4).expand(3, 4).t()
    assert not spread.is_contiguous()
    memory = weakref.ref(spread.untyped_storage())
    flight = Crossing(dist.group.WORLD, [4], [4]).launch(spread)
    del spread
    assert memory() is not None
    (landed,) = flight.land()
    assert memory() is None and torch.equal(landed, torch.ones(4, 3))


def test_what_has_to_be_copied_to_be_sent_lives_until_it_has_arrived():
    """The copy is made on the communication stream, whenever that gets there."""
    run_ranks(1, _send_what_has_to_be_copied)


# ---- time -------------------------------------------------------------------------------------


@needs_cuda
def test_a_launch_waits_for_its_mark_and_not_for_what_is_computed_after_it():
    stream = CommunicationStream(CUDA)
    for before, after in ((1, 1), (50 * _ABOUT_A_MILLISECOND, 500 * _ABOUT_A_MILLISECOND)):  # first to load kernels
        torch.cuda.synchronize()
        x = torch.zeros(1000, device=CUDA)
        torch.cuda._sleep(before)
        x += 1
        mark = stream.mark()
        torch.cuda._sleep(after)
        computed = torch.cuda.current_stream().record_event()
        with stream.after(mark):
            y = x + 1
            launched = torch.cuda.current_stream().record_event()
        early = launched.query()
        launched.synchronize()
        late = computed.query()
        computed.synchronize()
        assert torch.equal(y, torch.full_like(y, 2))
    assert not early, "it did not wait for what came before its mark"
    assert not late, "it waited for what came after its mark"


def _send_while_computing(rank):
    dispatcher, stream = AllToAllDispatcher(4, dist.group.WORLD), CommunicationStream(CUDA)
    x, weights = torch.randn(64, 8, device=CUDA), torch.rand(64, 2, device=CUDA)
    packed = dispatcher.pack(x, weights, torch.rand(64, 4, device=CUDA).topk(2).indices)
    for slow in (1, 500 * _ABOUT_A_MILLISECOND):  # first to make a communicator and load kernels
        torch.cuda.synchronize()
        mark = stream.mark()
        torch.cuda._sleep(slow)
        computed = torch.cuda.current_stream().record_event()
        with stream.after(mark):
            flight = dispatcher.send(*packed)
        waited = computed.query()
        rows, *_ = flight.land()
        assert torch.equal(rows, packed[0])
    assert not waited, "sending waited for what was computed after the mark"


@needs_cuda
def test_the_host_waits_for_counts_of_tokens_and_not_for_the_computation():
    run_ranks(1, _send_while_computing, backend="nccl", timeout=120)


@needs_cuda
@pytest.mark.parametrize("order", ORDERS)
def test_a_step_waits_for_the_device_nowhere_but_for_counts_of_tokens(order):
    """``Loopback`` needs none."""
    batch, dtype = build_batch(CUDA), torch.bfloat16
    model = build(CUDA, dtype, dispatcher=Loopback)
    engine = build_engine(model, "dualpipev", 1, dtype=dtype, device=CUDA, order=ORDERS[order])
    train(engine, batch)  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(engine, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Slow(Loopback):
    slow = _ABOUT_A_MILLISECOND


@needs_cuda
@pytest.mark.parametrize("order", ORDERS)
def test_kernels_run_while_tokens_travel(order, tmp_path):
    wide = replace(CONFIG, hidden_size=512, moe_intermediate_size=512, num_hidden_layers=4)
    batch = build_batch(CUDA, config=wide, length=256)
    engine = build_engine(
        build(CUDA, torch.bfloat16, dispatcher=Slow, config=wide),
        "dualpipev",
        1,
        dtype=torch.bfloat16,
        device=CUDA,
        order=ORDERS[order],
    )
    train(engine, batch)  # libraries set themselves up
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        train(engine, batch)
        torch.cuda.synchronize()
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    hidden = hidden_share(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    print(f"{order}: {hidden:.0%} of the communication stream's time lies under kernels of the computation")
    assert hidden > 0


def hidden_share(events):
    """Of the time in which any stream but the busiest works, the part in which the busiest does too."""
    streams: dict[object, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            interval = event["ts"], event["ts"] + event["dur"]
            streams.setdefault(event["args"]["stream"], []).append(interval)
    computing = max(streams, key=lambda stream: len(streams[stream]))
    compute = merged(streams.pop(computing))
    communication = merged([interval for intervals in streams.values() for interval in intervals])
    assert communication, "nothing ran on another stream"
    both = sum(
        max(min(end, other_end) - max(start, other_start), 0.0)
        for start, end in communication
        for other_start, other_end in compute
    )
    return both / sum(end - start for start, end in communication)


def merged(intervals):
    """The same time as intervals that do not overlap."""
    found: list[list[float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return found


def test_the_hidden_share_of_a_trace():
    """Stream 7 works from 0 to 4 and from 6 to 9, stream 13 from 3 to 7: hidden from 3 to 4 and from 6 to 7."""

    def event(stream, start, end, cat="kernel"):
        return {"cat": cat, "ts": start, "dur": end - start, "args": {"stream": stream}}

    trace = [event(7, 0, 3), event(7, 2, 4), event(7, 6, 9), event(13, 3, 6, "gpu_memcpy"), event(13, 5, 7)]
    assert hidden_share([*trace, {"cat": "cpu_op", "ts": 0, "dur": 9}, {"ph": "M"}]) == pytest.approx(2 / 4)
