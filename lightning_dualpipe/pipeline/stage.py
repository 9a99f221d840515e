"""One stage of the model on this rank, and the microbatches it is still holding.

    forward          keeps the graph, returns what the next stage receives (the last: its sums)
    backward         consumes the graph, returns the gradients for the previous stage
    backward_input   the same, but weight gradients that can wait are put aside
    backward_weight  computes what was put aside for that microbatch

``backward = backward_input; backward_weight``. Layers that cannot postpone their weight gradient
(norms, embeddings, foreign autograd functions) compute it in ``backward_input``; that is always right.

A stage whose layers communicate is cut at every communication, and forward and backward are generators
that stop after each step, so that something else can be computed while tokens travel:

    forward      compute │ launch, beside │ land, compute │ launch, beside │ land, compute
    backward     compute │ launch, beside │ land, compute │ …               the same way back

*Beside* a flight run the phases behind it that need nothing of what travels. Weight gradients that can
wait are left to whoever drives the generator, who runs them after a launch.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_dualpipe.interface import Batch, Flight, Layer, Phase, PipelineModel, Values, WeightGradients
from lightning_dualpipe.pipeline.graph import Entrance, Graph, detached
from lightning_dualpipe.pipeline.record import Watch, unwatched
from lightning_dualpipe.pipeline.streams import CommunicationStream, Mark
from lightning_dualpipe.recompute import run_phase
from lightning_dualpipe.schedules.record import Work

__all__ = ["Stage"]

T = TypeVar("T")


@dataclass(slots=True)
class Stage:
    """``layers`` of ``model`` on this rank.

    Args:
        context: wraps every forward (autocast, FP8).
        overlap: cut where layers communicate; otherwise each waits for its own communication.
        stream: where a GPU communicates.
    """

    index: int
    num_stages: int
    model: PipelineModel
    layers: Sequence[Layer]
    weight_gradients: WeightGradients
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    overlap: bool = True
    stream: CommunicationStream = field(default_factory=lambda: CommunicationStream(torch.device("cpu")))
    _held: dict[int, list["_Record"]] = field(default_factory=dict)
    _postponed: defaultdict[int, list[Callable[[], None]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    @property
    def num_held(self) -> int:
        """Microbatches whose graph is alive."""
        return len(self._held)

    @property
    def num_waiting(self) -> int:
        """Weight gradients that were put aside."""
        return sum(map(len, self._postponed.values()))

    @property
    def communicates(self) -> bool:
        """Whether a microbatch takes more than one step."""
        return self.overlap and any(phase.communicates for layer in self.layers for phase in layer.phases)

    def forget(self) -> None:
        """All microbatches, whatever has become of them."""
        self._held.clear()
        self._postponed.clear()
        self.weight_gradients.take()

    def predict(self, values: Values, batch: Batch) -> Values:
        """Values of the stage's last layer; no graph is kept."""
        with self.context():
            return _run(self._phases(with_loss=False), self._inputs(values, batch), batch)

    def evaluate(self, values: Values, batch: Batch) -> Values | dict[str, Tensor]:
        """As ``forward``, for a microbatch that has no backward."""
        with self.context():
            values = _run(self._phases(), self._inputs(values, batch), batch)
            return dict(self.model.loss(values, batch)) if self.is_last else values

    def forward(self, microbatch: int, values: Values, batch: Batch) -> Values | dict[str, Tensor]:
        """Detached values for the next stage; on the last stage the model's sums, detached."""
        return _finish(self.forward_steps(microbatch, values, batch))

    def backward(self, microbatch: int, gradients: Values | None) -> Values:
        """``gradients`` belong to the floating-point outputs; None on the last stage: its loss sum has gradient 1."""
        given = _finish(self.backward_steps(microbatch, gradients, postpone=False))
        self.backward_weight(microbatch)
        return given

    def backward_input(self, microbatch: int, gradients: Values | None) -> Values:
        return _finish(self.backward_steps(microbatch, gradients, postpone=True))

    @torch.no_grad()  # runs outside the autograd engine: a gradient must not carry a graph
    def backward_weight(self, microbatch: int, watch: Watch = unwatched) -> None:
        """Also in the middle of a backward: what has been put aside so far."""
        if waiting := self._postponed.pop(microbatch, []):
            with watch(Work.WEIGHTS, ()):
                for compute in waiting:
                    compute()

    # ---- step by step -------------------------------------------------------------------------

    def forward_steps(
        self, microbatch: int, values: Values, batch: Batch, watch: Watch = unwatched
    ) -> Generator[None, None, Values | dict[str, Tensor]]:
        values = self._inputs(values, batch)
        wanted = not self.is_first
        records: list[_Record] = []
        *pieces, last = _cut(self._phases()) if self.communicates else [_Piece(tuple(self._phases()))]
        for piece in pieces:
            graph, values = self._compute(piece.compute, values, batch, watch, wanted=wanted)
            wanted = True
            mark = self.stream.mark()
            yield
            flying, beside = piece.communication, None
            assert flying is not None and flying.launch is not None
            with self.stream.after(mark), watch(Work.LAUNCH, (flying,)):
                flight = flying.launch(*flying.own(values))
            values = flying.replaced(values, (None,) * len(flying.own(values)))
            if piece.beside:
                beside, values = self._compute(piece.beside, values, batch, watch)
            records.append(_Record(graph, piece, flight, beside))
            yield
            values = flying.replaced(values, _landed(flight, flying, watch))
        result: Values | dict[str, Tensor]
        end = self._conclude if self.is_last else self._compute
        graph, result = end(last.compute, values, batch, watch, wanted=wanted)
        records.append(_Record(graph, last))
        self._held[microbatch] = records
        return result

    def backward_steps(
        self, microbatch: int, gradients: Values | None, *, postpone: bool, watch: Watch = unwatched
    ) -> Generator[None, None, Values]:
        """With ``postpone`` off, weight gradients are put aside only where that leaves time for a communication."""
        records = self._held[microbatch]
        last = records[-1].graph
        gradients = last.seeds() if gradients is None else last.aligned(gradients)
        deferring = postpone or len(records) > 1
        mark: Mark = None
        while records:  # each is freed when it has been used
            record = records.pop()
            compute, flying, beside = record.piece
            if record.flight is not None:
                assert flying is not None
                with self.stream.after(mark), watch(Work.LAUNCH, (flying,)):
                    flight = record.flight.back(flying.own(gradients))
                gradients = flying.replaced(gradients, (None,) * len(flying.own(gradients)))
                if record.beside is not None:
                    with watch(Work.BACKWARD, beside):
                        gradients = self._differentiate(record.beside, gradients, microbatch, deferring)
                yield
                gradients = flying.replaced(gradients, _landed(flight, flying, watch))
            with watch(Work.BACKWARD, compute):
                gradients = self._differentiate(record.graph, gradients, microbatch, deferring)
            mark = self.stream.mark()
            if records:
                yield
        del self._held[microbatch]
        return () if self.is_first else tuple(gradient for gradient in gradients if gradient is not None)

    def _compute(
        self, phases: Sequence[Phase], values: Values, batch: Batch, watch: Watch, *, wanted: bool = True
    ) -> tuple[Graph, Values]:
        """A graph from ``values``, whose gradients are ``wanted``, and what it computes, detached."""
        entrance = Entrance() if wanted else None
        with self.context(), watch(Work.FORWARD, phases):
            outputs = _run(phases, entrance.enter(values) if entrance is not None else values, batch)
        return Graph.of(entrance, outputs), detached(outputs)

    def _conclude(
        self, phases: Sequence[Phase], values: Values, batch: Batch, watch: Watch, *, wanted: bool
    ) -> tuple[Graph, dict[str, Tensor]]:
        """The same with the loss behind it, for the end of the model."""
        entrance = Entrance() if wanted else None
        with self.context(), watch(Work.FORWARD, phases):
            outputs = _run(phases, entrance.enter(values) if entrance is not None else values, batch)
            sums = dict(self.model.loss(outputs, batch))
        return Graph.of(entrance, (sums["loss"],)), {name: value.detach() for name, value in sums.items()}

    def _differentiate(self, graph: Graph, gradients: Values, microbatch: int, deferring: bool) -> Values:
        self.weight_gradients.deferring = deferring
        try:
            return graph.backward(gradients)
        finally:
            self.weight_gradients.deferring = False
            self._postponed[microbatch] += self.weight_gradients.take()

    def _inputs(self, values: Values, batch: Batch) -> Values:
        if not self.is_first:
            return values
        first = self.model.inputs(batch)
        return first if isinstance(first, tuple) else (first,)

    def _phases(self, *, with_loss: bool = True) -> list[Phase]:
        return [phase for layer in self.layers if with_loss or not layer.for_loss for phase in layer.phases]


def _finish(steps: Generator[None, None, T]) -> T:
    """All steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _landed(flight: Flight, phase: Phase, watch: Watch) -> Values:
    with watch(Work.TOKENS, (phase,)):
        return flight.land()


class _Piece(NamedTuple):
    """Compute; then communicate, and beside that compute more."""

    compute: tuple[Phase, ...]
    communication: Phase | None = None
    beside: tuple[Phase, ...] = ()


class _Record(NamedTuple):
    """What a piece leaves for its backward."""

    graph: Graph
    piece: _Piece
    flight: Flight | None = None
    beside: Graph | None = None


def _cut(phases: Sequence[Phase]) -> list[_Piece]:
    """The last piece only computes."""
    todo = list(phases)
    pieces: list[_Piece] = []
    while True:
        compute = _take_while(todo, lambda phase: not phase.communicates)
        if not todo:
            return [*pieces, _Piece(compute)]
        flying = todo.pop(0)
        pieces.append(_Piece(compute, flying, _take_while(todo, flying.is_passed_by)))


def _take_while(todo: list[Phase], wanted: Callable[[Phase], bool]) -> tuple[Phase, ...]:
    count = next((index for index, phase in enumerate(todo) if not wanted(phase)), len(todo))
    taken = tuple(todo[:count])
    del todo[:count]
    return taken


def _run(phases: Iterable[Phase], values: Values, batch: Batch) -> Values:
    for phase in phases:
        values = run_phase(phase, values, batch)
    return values
