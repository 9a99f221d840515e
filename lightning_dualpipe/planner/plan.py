"""Try every layout: what fits, how fast it is, and why the others do not.

    request ─► layouts ─► stages ─► layer times ─► pairs, lone stages ─► the pipeline of a step ─► + synchronisation
                             └────► memory

Everything that layouts share is computed once: the cut per number of stages, layer times per expert size and
microbatch, durations per both.
"""

from dataclasses import dataclass, field

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.planner.estimate import Conditions, estimate_layers
from lightning_dualpipe.planner.hardware import Hardware, Precision
from lightning_dualpipe.planner.layout import Layout, layouts
from lightning_dualpipe.planner.memory import Memory, Storage, largest_memory, near
from lightning_dualpipe.planner.model import LayerShape, ModelShape
from lightning_dualpipe.planner.overlap import StageTimes, pair, stage_times
from lightning_dualpipe.planner.profile import Profile
from lightning_dualpipe.planner.request_rules import request_problems
from lightning_dualpipe.planner.stages import cut, num_pieces
from lightning_dualpipe.planner.step import num_pairs, pipeline_seconds
from lightning_dualpipe.planner.synchronize import Synchronization, synchronization
from lightning_dualpipe.planner.times import LayerTimes
from lightning_dualpipe.schedules import SCHEDULES

__all__ = ["Estimate", "Plan", "Request", "make_plan"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. Sizes that are None are the planner's to choose."""

    model: ModelShape
    hardware: Hardware
    gpus: int
    batch_sequences: int
    precision: Precision = "fp8"
    schedules: tuple[str, ...] = SCHEDULES
    pipeline: int | None = None
    expert: int | None = None
    microbatch_sequences: int | None = None
    recompute: bool = True
    overlap: bool = True  # pairs hide communication; without, a pair is a forward and a backward
    hide_alone: bool = True  # lone backwards hide theirs behind weight gradients
    gradient_bytes: int = 4
    optimizer_bytes: int = 12
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if problems := request_problems(self):
            raise ConfigurationError.of("this cannot be planned", problems)

    @property
    def storage(self) -> Storage:
        return Storage(self.precision == "fp8", self.recompute, self.gradient_bytes, self.optimizer_bytes)

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch_sequences * self.model.sequence_length


@dataclass(frozen=True, slots=True)
class Estimate:
    """One layout, priced. The four parts of a step are seconds of an average rank, and add up to ``step``."""

    layout: Layout
    memory: Memory
    step: float
    compute: float
    exposed: float  # communication of experts that nothing hides
    bubble: float  # waiting for others, the slowest stage included
    synchronization: float
    communication: float  # of experts, hidden or not
    tokens_per_second_per_gpu: float
    mfu: float  # of the BF16 peak, whatever the precision, as published figures are
    fits: bool

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        return 1e12 / self.tokens_per_second_per_gpu / 3600


@dataclass(frozen=True, slots=True)
class Plan:
    """``fitting`` and ``too_large`` are sorted, the fastest and the smallest first."""

    request: Request
    fitting: tuple[Estimate, ...]
    too_large: tuple[Estimate, ...]
    impossible: tuple[str, ...]  # sizes that do not divide, once each

    @property
    def recommended(self) -> Estimate | None:
        return self.fitting[0] if self.fitting else None


def make_plan(request: Request) -> Plan:
    """Price every layout there is. Raises ConfigurationError if there is none."""
    priced: list[Estimate] = []
    impossible: dict[str, None] = {}
    costs = _Costs(request)
    for found in layouts(
        gpus=request.gpus,
        batch_sequences=request.batch_sequences,
        num_experts=request.model.num_experts,
        num_pieces=num_pieces(request.model),
        schedules=request.schedules,
        pipelines=_chosen(request.pipeline),
        experts=_chosen(request.expert),
        sequences=_chosen(request.microbatch_sequences),
    ):
        if isinstance(found, str):
            impossible[found] = None
        else:
            priced.append(costs.estimate(found))
    if not priced:
        raise ConfigurationError.of("no layout is possible; change the sizes so that they divide", list(impossible))
    fitting = sorted((one for one in priced if one.fits), key=_preference)
    too_large = sorted((one for one in priced if not one.fits), key=lambda one: one.memory.total)
    return Plan(request, tuple(fitting), tuple(too_large), tuple(impossible))


def _preference(one: Estimate) -> tuple[float, float, int]:
    """The faster, the smaller, then the first schedule of the list; what differs by rounding is equal."""
    return float(f"{one.step:.6g}"), float(f"{one.memory.total:.6g}"), SCHEDULES.index(one.layout.schedule)


def _chosen(size: int | None) -> tuple[int, ...]:
    return () if size is None else (size,)


@dataclass(frozen=True, slots=True)
class _Stages:
    """A cut and what its stages take under one expert size and microbatch."""

    layers: tuple[tuple[LayerShape, ...], ...]
    times: tuple[StageTimes, ...]
    pairs: tuple[float, ...]  # of a stage and its mirror image, mean of both ways


@dataclass(slots=True)
class _Costs:
    """Prices layouts of one request, and remembers what they share."""

    request: Request
    _factors: LayerTimes | None = None
    _layers: dict[tuple[int, int], dict[str, LayerTimes]] = field(default_factory=dict)
    _stages: dict[tuple[int, bool, int, int], _Stages] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.request.profile is not None:
            self._factors = self.request.profile.factors(self.request.model)

    def estimate(self, layout: Layout) -> Estimate:
        request = self.request
        stages = self._stages_of(layout)
        memory = largest_memory(layout, request.model, stages.layers, request.storage)
        send = layout.sequences * request.model.sequence_length * request.model.hidden * 2 / request.hardware.network
        running = pipeline_seconds(layout.schedule, layout.num_microbatches, stages.times, stages.pairs, send)
        after = self._synchronization(layout, stages)
        share = layout.num_microbatches / layout.pipeline  # each stage computes every microbatch on one of its ranks
        compute = share * sum(stage.compute for stage in stages.times)
        busy = _busy(layout, stages)
        step = running + after.total
        rate = request.tokens / step / request.gpus
        return Estimate(
            layout=layout,
            memory=memory,
            step=step,
            compute=compute,
            exposed=max(0.0, busy - compute),
            bubble=max(0.0, running - max(busy, compute)),
            synchronization=after.total,
            communication=share * sum(stage.communication for stage in stages.times),
            tokens_per_second_per_gpu=rate,
            mfu=rate * request.model.training_flops / request.hardware.bf16_peak,
            fits=memory.total <= request.hardware.memory,
        )

    def _synchronization(self, layout: Layout, stages: _Stages) -> Synchronization:
        ranks = range(layout.pipeline)
        parameters = max((near(layout, stages.layers, rank) for rank in ranks), key=lambda it: it.dense + it.experts)
        return synchronization(
            layout,
            parameters,
            self.request.storage,
            self.request.hardware,
            window=min(stage.backward_weight for stage in stages.times),
            num_layers=max(1, len(self.request.model.layers) * layout.copies // layout.pipeline),
        )

    def _stages_of(self, layout: Layout) -> _Stages:
        key = (layout.num_stages, layout.placement.is_mirrored, layout.expert, layout.sequences)
        if key not in self._stages:
            self._stages[key] = self._make_stages(*key)
        return self._stages[key]

    def _make_stages(self, num_stages: int, mirrored: bool, expert: int, sequences: int) -> _Stages:
        layers = cut(self.request.model, num_stages, mirrored=mirrored)  # kept there
        named = self._layer_times(expert, sequences)
        times = [[named[layer.name] for layer in stage] for stage in layers]
        alone = tuple(stage_times(stage, hide_alone=self.request.hide_alone) for stage in times)
        ends = [(index, num_stages - 1 - index) for index in range((num_stages + 1) // 2)]
        if self.request.overlap:
            both = [(pair(times[a], times[b]) + pair(times[b], times[a])) / 2 for a, b in ends]
        else:
            both = [sum(alone[s].forward + alone[s].backward for s in two) / 2 for two in ends]
        return _Stages(layers, alone, tuple(both))

    def _layer_times(self, expert: int, sequences: int) -> dict[str, LayerTimes]:
        request, key = self.request, (expert, sequences)
        if key not in self._layers:
            tokens = sequences * request.model.sequence_length
            given = Conditions(request.model, request.hardware, request.precision, tokens, expert, request.recompute)
            times = estimate_layers(request.model.layers, given)
            if self._factors is not None:
                times = tuple(time * self._factors for time in times)
            self._layers[key] = {layer.name: time for layer, time in zip(request.model.layers, times, strict=True)}
        return self._layers[key]


def _busy(layout: Layout, stages: _Stages) -> float:
    """Seconds an average rank works in a step, all-to-alls that it waits for included."""
    count, num = len(stages.times), layout.num_microbatches
    passes = num * layout.num_stages / layout.pipeline
    split = layout.schedule == "zb1p"
    lone = [s.forward + (s.backward_input + s.backward_weight if split else s.backward) for s in stages.times]
    paired = num_pairs(layout.schedule, num, layout.num_stages)
    mean_pair = sum(stages.pairs) / len(stages.pairs)
    return paired * mean_pair + (passes - paired) * sum(lone) / count
