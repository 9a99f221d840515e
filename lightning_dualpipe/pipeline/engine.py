"""Run a lowered program on this rank.

The schedule decides what is computed when, its lowering what is sent when; the engine only follows.
It knows stages and messages, not the model, and computes local gradients: replicas and data ranks
are summed afterwards (``parallel.replicas``). The forward and the backward of a step run together
(``pipeline.overlap``), and what either gives is handed on as soon as it is there.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Batch, PipelineModel, TensorSpec, Values
from lightning_dualpipe.pipeline.overlap import ORDERS, LaunchOrder, run_pair
from lightning_dualpipe.pipeline.record import NOBODY, Observer, Watch, unwatched
from lightning_dualpipe.pipeline.stage import Stage
from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.schedules import Action, Compute, Exchange, Instruction, Kind, Message, Schedule, Step, lower
from lightning_dualpipe.schedules.record import Work

__all__ = ["Engine"]

T = TypeVar("T")

_Key = tuple[Kind, int, int]  # what is on its way: kind, the stage it goes to, microbatch


class Engine:
    """Executes training, evaluation and prediction programs of one pipeline rank.

    Args:
        schedule_of: number of microbatches -> schedule; each is lowered once and kept.
        rank: this rank's place in the pipeline.
        stages: the stages this rank serves, by index.
        dtype: what crosses a boundary whose ``TensorSpec`` names no dtype.
        order: who goes on when a forward and a backward run at once.
    """

    def __init__(
        self,
        model: PipelineModel,
        schedule_of: Callable[[int], Schedule],
        *,
        rank: int,
        stages: Mapping[int, Stage],
        transport: Transport,
        dtype: torch.dtype,
        order: LaunchOrder = ORDERS["eager"],
    ) -> None:
        self.model = model
        self.rank = rank
        self.stages = stages
        self.dtype = dtype
        self.peak_held = 0
        """Most microbatches whose activations this rank held at once, in the last training step."""
        self.losses: dict[int, Tensor] = {}
        """By microbatch the loss of the last step, a sum over tokens, of those whose last stage is here."""
        self.observer: Observer = NOBODY
        """Is told of the next training step, and of no other."""
        self._order = order
        self._transport = transport
        self._schedule_of = lru_cache(maxsize=64)(schedule_of)
        self._programs = lru_cache(maxsize=64)(self._program)
        self._values: dict[_Key, Values] = {}
        self._messages: dict[_Key, Message] = {}
        self._specs: list[tuple[TensorSpec, ...]] = []
        self._leaving: dict[_Key, Message] = {}

    def train(
        self, batches: Sequence[Batch], *, on_stage_done: Callable[[int], None] = lambda stage: None
    ) -> dict[str, Tensor]:
        """Forward and backward of every microbatch; gradients of the summed loss are added to ``.grad``.

        ``on_stage_done`` is told each stage that has computed its last weight gradient.
        Returns the sums of the microbatches whose last stage is here; an empty dict if none is.
        """
        self.peak_held = 0
        sums: dict[str, Tensor] = {}
        last = self._last_actions(len(batches))

        def execute(step: Step) -> None:
            self._train_step(step, batches, sums)
            for action in step:
                if action == last[action.stage]:
                    on_stage_done(action.stage)

        self.observer.begin(self._schedule_of(len(batches)))
        try:
            self._run(batches, execute, training=True)
        finally:
            self.observer = NOBODY
        return sums

    def _train_step(self, step: Step, batches: Sequence[Batch], sums: dict[str, Tensor]) -> None:
        forward = backward = None
        weights, forward_done, backward_done = _nothing, _nothing, _nothing
        for action in step:
            stage, microbatch, watch = self.stages[action.stage], action.microbatch, self.observer.watch(action)
            match action.kind:
                case Kind.FORWARD:
                    forward = _named(action, self.rank, self._forward_steps(action, batches[microbatch], watch))
                    forward_done = partial(self._forward_done, action, sums)
                case Kind.BACKWARD | Kind.BACKWARD_INPUT:
                    backward = _named(action, self.rank, self._backward_steps(action, watch))
                    backward_done = partial(self._pass_back, action)
                    postponed = action.kind is Kind.BACKWARD_INPUT
                    weights = _nothing if postponed else partial(stage.backward_weight, microbatch, watch)
                case Kind.BACKWARD_WEIGHT:
                    stage.backward_weight(microbatch, watch)
        run_pair(
            forward,
            backward,
            weights=weights,
            forward_done=forward_done,
            backward_done=backward_done,
            order=self._order,
        )

    # What came in belongs to the steps alone: they let go of it when it has been used.

    def _forward_steps(
        self, action: Action, batch: Batch, watch: Watch
    ) -> Generator[None, None, Values | dict[str, Tensor]]:
        stage = self.stages[action.stage]
        return stage.forward_steps(action.microbatch, self._take_input(action, watch), batch, watch)

    def _backward_steps(self, action: Action, watch: Watch) -> Generator[None, None, Values]:
        stage, postpone = self.stages[action.stage], action.kind is Kind.BACKWARD_INPUT
        gradients = self._take_gradients(action, watch)
        return stage.backward_steps(action.microbatch, gradients, postpone=postpone, watch=watch)

    def _forward_done(self, action: Action, sums: dict[str, Tensor], out: Values | dict[str, Tensor]) -> None:
        self.peak_held = max(self.peak_held, sum(stage.num_held for stage in self.stages.values()))
        self._pass_on(action, out, sums)

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Forwards only; returns sums as ``train`` does."""
        sums: dict[str, Tensor] = {}

        def execute(step: Step) -> None:
            (action,) = step
            with _told(action, self.rank):
                values = self.stages[action.stage].evaluate(self._take_input(action), batches[action.microbatch])
            self._pass_on(action, values, sums)

        self._run(batches, execute, training=False)
        return sums

    def predict(self, batches: Sequence[Batch]) -> dict[int, Tensor]:
        """The first output of the model, by microbatch, for those whose last stage is here."""
        outputs: dict[int, Tensor] = {}

        def execute(step: Step) -> None:
            (action,) = step
            stage = self.stages[action.stage]
            with _told(action, self.rank):
                values = stage.predict(self._take_input(action), batches[action.microbatch])
            if stage.is_last:
                outputs[action.microbatch] = values[0]
            else:
                self._pass_on(action, values, {})

        self._run(batches, execute, training=False)
        return outputs

    def owner_of_output(self, microbatch: int, num_microbatches: int) -> int:
        """The pipeline rank whose last stage sees this microbatch."""
        schedule = self._schedule_of(num_microbatches)
        return schedule.rank_of(schedule.num_stages - 1, microbatch)

    def _run(self, batches: Sequence[Batch], execute: Callable[[Step], None], *, training: bool) -> None:
        self._forget()
        self._specs = [self._declared(batch) for batch in batches]
        instructions = self._programs(len(batches), training)
        exchanges = [instruction for instruction in instructions if isinstance(instruction, Exchange)]
        self._leaving = {_key(message): message for exchange in exchanges for message in exchange.sends}
        for instruction in instructions:
            match instruction:
                case Exchange(sends, receives):
                    self._messages |= {_key(message): message for message in receives}
                    self._transport.exchange(sends, [(message, self._message_specs(message)) for message in receives])
                case Compute(step):
                    execute(step)
        self._transport.finish()
        assert not self._values, f"computed but never used: {sorted(map(str, self._values))}"

    def _forget(self) -> None:
        """What a step has left that was given up in the middle."""
        self._values, self._messages, self._leaving, self.losses = {}, {}, {}, {}
        self._transport.forget()
        for stage in self.stages.values():
            stage.forget()

    def _program(self, num_microbatches: int, training: bool) -> Sequence[Instruction]:
        schedule = self._schedule_of(num_microbatches)
        lowered = lower(schedule if training else schedule.forward_only())[self.rank]
        return self._transport.arrange(lowered.instructions)

    def _last_actions(self, num_microbatches: int) -> dict[int, Action]:
        return {
            action.stage: action for step in self._schedule_of(num_microbatches).steps[self.rank] for action in step
        }

    def _declared(self, batch: Batch) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(spec.shape, spec.dtype or self.dtype) for spec in self.model.boundary(batch))

    def _message_specs(self, message: Message) -> Sequence[TensorSpec]:
        specs = self._specs[message.microbatch]
        return specs if message.kind is Kind.FORWARD else [spec for spec in specs if _is_floating(spec)]

    def _take(self, key: _Key, watch: Watch) -> Values:
        if key in self._values:  # the neighbouring stage is on this rank too
            return self._values.pop(key)
        with watch(Work.MESSAGE, ()):
            return self._transport.take(self._messages.pop(key))

    def _take_input(self, action: Action, watch: Watch = unwatched) -> Values:
        first = self.stages[action.stage].is_first
        return () if first else self._take((Kind.FORWARD, action.stage, action.microbatch), watch)

    def _take_gradients(self, action: Action, watch: Watch) -> Values | None:
        last = self.stages[action.stage].is_last
        return None if last else self._take((Kind.BACKWARD, action.stage, action.microbatch), watch)

    def _pass_on(self, action: Action, out: Values | dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        if isinstance(out, dict):
            self.losses[action.microbatch] = out["loss"].detach()
            for name, value in out.items():
                sums[name] = sums[name] + value if name in sums else value
        else:
            values = self._as_declared(out, self._specs[action.microbatch], action)
            self._hand_over((Kind.FORWARD, action.stage + 1, action.microbatch), values)

    def _pass_back(self, action: Action, gradients: Values) -> None:
        if action.stage > 0:
            self._hand_over((Kind.BACKWARD, action.stage - 1, action.microbatch), gradients)

    def _hand_over(self, key: _Key, values: Values) -> None:
        if key in self._leaving:
            self._transport.offer(self._leaving.pop(key), values)
        else:
            self._values[key] = values

    def _as_declared(self, values: Values, specs: Sequence[TensorSpec], action: Action) -> Values:
        """Outputs in the dtypes that were declared; a cast that would lose precision is refused."""
        found = [(tuple(value.shape), value.dtype) for value in values]
        declared = [(spec.shape, spec.dtype) for spec in specs]
        fits = len(found) == len(declared) and all(
            shape == want and want_dtype is not None and torch.promote_types(dtype, want_dtype) == want_dtype
            for (shape, dtype), (want, want_dtype) in zip(found, declared, strict=True)
        )
        if not fits:
            raise ConfigurationError(
                f"{type(self.model).__name__}.boundary(batch) declares {_listed(declared)}, but layer "
                f"{self.stages[action.stage].layers[-1].name!r} returns {_listed(found)}; "
                f"declare what crosses from one layer to the next, dtype included if it is not {self.dtype}"
            )
        return tuple(value.to(spec.dtype) for value, spec in zip(values, specs, strict=True))


@contextmanager
def _told(action: Action, rank: int) -> Generator[None, None, None]:
    """Errors say what was being done."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while pipeline rank {rank} ran {action} (stage, kind, microbatch)")
        raise


def _named(action: Action, rank: int, steps: Generator[None, None, T]) -> Generator[None, None, T]:
    with _told(action, rank):
        return (yield from steps)


def _nothing(*_: object) -> None:
    pass


def _key(message: Message) -> _Key:
    return (message.kind, message.target_stage, message.microbatch)


def _is_floating(spec: TensorSpec) -> bool:
    return spec.dtype is not None and spec.dtype.is_floating_point


def _listed(tensors: Sequence[tuple[tuple[int, ...], torch.dtype | None]]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for shape, dtype in tensors) or "nothing"
