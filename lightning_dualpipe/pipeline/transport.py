"""Move the tensors of a message between two ranks of one pipeline.

Which messages travel, and when each end posts them, was decided when the schedule was lowered
(``schedules.exchange``); here they only become sends and receives. NCCL matches operations of two
ranks by order alone, so one exchange is one batch, built in the same order on both ends. It is put
into the stream behind what makes its tensors and not behind what was computed since. gloo matches by
tag, so there neither end need wait for the exchange: a receive is posted one exchange early, a send as
soon as there is something to send, in the middle of a step if need be.

A receive is waited for where its tensors are used, a send a few exchanges later, when it has long
arrived: until then its tensors must live.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.interface import TensorSpec
from lightning_dualpipe.parallel.flight import used_here
from lightning_dualpipe.pipeline.streams import CommunicationStream, Mark
from lightning_dualpipe.schedules import Exchange, Instruction, Message

__all__ = ["Transport"]


@dataclass(slots=True)
class Transport:
    """Sends and receives of one rank over ``group``, whose ranks are the pipeline's."""

    group: dist.ProcessGroup | None
    device: torch.device
    stream: CommunicationStream = field(default_factory=lambda: CommunicationStream(torch.device("cpu")))
    _offered: dict[Message, "_Offer"] = field(default_factory=dict)
    _arriving: dict[Message, tuple[list[dist.Work], tuple[Tensor, ...]]] = field(default_factory=dict)
    _leaving: deque[tuple[list[dist.Work], list[Tensor]]] = field(default_factory=deque)

    def arrange(self, instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
        """A rank's program with its receives where this transport should post them."""
        return tuple(instructions) if self._in_batches else tuple(_receiving_early(instructions))

    def offer(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """What an exchange to come sends. Empty tensors do not travel: both ends know their shape."""
        outgoing = [(index, tensor.contiguous()) for index, tensor in enumerate(tensors) if tensor.numel()]
        works = [] if self._in_batches else self._post_sends(message, outgoing)
        self._offered[message] = _Offer(outgoing, works, self.stream.mark())

    def exchange(self, sends: Iterable[Message], receives: Iterable[tuple[Message, Sequence[TensorSpec]]]) -> None:
        """Post all of one exchange, wait for none of it. What is sent has been offered before."""
        offers = [(message, self._offered.pop(message)) for message in sends]
        incoming: list[tuple[Message, int, Tensor]] = []
        with self.stream.after():  # where they are filled
            for message, specs in receives:
                tensors = tuple(torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs)
                self._arriving[message] = ([], tensors)
                incoming += [(message, index, tensor) for index, tensor in enumerate(tensors) if tensor.numel()]
        if self._in_batches:
            self._post_batch(offers, incoming)
        else:
            self._post_receives(incoming)
            works = [work for _, offer in offers for work in offer.works]
            if works:
                self._leaving.append((works, [tensor for _, offer in offers for _, tensor in offer.outgoing]))
        while len(self._leaving) > _EXCHANGES_IN_FLIGHT:
            self._see_off()

    def take(self, message: Message) -> tuple[Tensor, ...]:
        """The tensors of a message, once they have arrived."""
        works, tensors = self._arriving.pop(message)
        try:
            _wait(works)
        except RuntimeError as error:
            error.add_note(f"while it waited for {message} of its pipeline")
            raise
        used_here(*tensors)
        return tensors

    def finish(self) -> None:
        """Wait until everything sent has left."""
        while self._leaving:
            self._see_off()
        assert not self._arriving, f"received but never used: {list(map(str, self._arriving))}"

    def forget(self) -> None:
        """Messages of a step that was given up: nobody will come for them."""
        self._offered.clear()
        self._arriving.clear()
        self._leaving.clear()

    def _see_off(self) -> None:
        works, _ = self._leaving.popleft()
        _wait(works)

    @property
    def _in_batches(self) -> bool:
        """Of a backend other than gloo nothing is taken for granted but the order."""
        return self.group is not None and dist.get_backend(self.group) != "gloo"

    def _post_sends(self, message: Message, outgoing: list[tuple[int, Tensor]]) -> list[dist.Work]:
        works = (
            dist.isend(tensor, group=self.group, group_dst=message.target_rank, tag=_tag(message, index))
            for index, tensor in outgoing
        )
        return [work for work in works if work is not None]

    def _post_receives(self, incoming: list[tuple[Message, int, Tensor]]) -> None:
        for message, index, tensor in incoming:
            work = dist.irecv(tensor, group=self.group, group_src=message.source_rank, tag=_tag(message, index))
            assert work is not None
            self._arriving[message][0].append(work)

    def _post_batch(self, offers: list[tuple[Message, "_Offer"]], incoming: list[tuple[Message, int, Tensor]]) -> None:
        """One group call. Between two ranks the operations are in the order of (message, index) on both ends."""
        outgoing = [(message, index, tensor, True) for message, offer in offers for index, tensor in offer.outgoing]
        order = sorted(outgoing + [(m, i, t, False) for m, i, t in incoming], key=_key)
        operations = [
            dist.P2POp(dist.isend, tensor, group=self.group, group_peer=message.target_rank)
            if leaves
            else dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=message.source_rank)
            for message, _, tensor, leaves in order
        ]
        if not operations:
            return
        with self.stream.after(*(offer.mark for _, offer in offers)):
            works = list(dist.batch_isend_irecv(operations))  # one list for all: whoever waits first waits for all
        for message, _, _ in incoming:
            self._arriving[message] = (works, self._arriving[message][1])
        self._leaving.append((works, [tensor for _, _, tensor, leaves in order if leaves]))


class _Offer(NamedTuple):
    """Tensors by their index in the message, the sends that are posted already, and what makes them."""

    outgoing: list[tuple[int, Tensor]]
    works: list[dist.Work]
    mark: Mark


def _wait(works: list[dist.Work]) -> None:
    """Once for each: to gloo, waiting again is waiting for another message."""
    while works:
        works.pop().wait()


def _receiving_early(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
    """Each exchange posts the receives of the one after it; those of the first come before everything."""
    exchanges = [instruction for instruction in instructions if isinstance(instruction, Exchange)]
    following = iter([*exchanges, Exchange((), ())])
    if exchanges:
        yield Exchange((), next(following).receives)
    for instruction in instructions:
        if isinstance(instruction, Exchange):
            yield Exchange(instruction.sends, next(following).receives)
        else:
            yield instruction


_EXCHANGES_IN_FLIGHT = 8
_TENSORS_PER_MESSAGE = 64


def _tag(message: Message, index: int) -> int:
    assert index < _TENSORS_PER_MESSAGE, f"a boundary may carry {_TENSORS_PER_MESSAGE} tensors"
    return message.tag * _TENSORS_PER_MESSAGE + index


def _key(operation: tuple[Message, int, Tensor, bool]) -> tuple[int, int]:
    message, index, _, _ = operation
    return message.tag, index
