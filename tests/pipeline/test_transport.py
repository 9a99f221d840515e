"""Which operations a transport posts, and in what order: fakes stand for the backend, so no process is started.

That real messages arrive is tested with the engine.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.interface import TensorSpec
from lightning_dualpipe.pipeline.transport import Transport
from lightning_dualpipe.schedules import SCHEDULES, Compute, Exchange, build_schedule, lower
from tests.pipeline.small import CPU

SPECS = [TensorSpec((2, 3), torch.float32), TensorSpec((0,), torch.float32), TensorSpec((4,), torch.int64)]


class Work:
    """A piece of work."""

    all: ClassVar[list["Work"]] = []

    def __init__(self):
        self.waited = 0
        self.all.append(self)

    def wait(self):
        self.waited += 1


@dataclass
class Operation:
    kind: str  # "send" or "receive"
    peer: int
    tensor: torch.Tensor
    tag: int | None = None


@pytest.fixture
def posted(monkeypatch):
    """The operations in the order in which they were posted; a list for each batch."""
    found = []
    monkeypatch.setattr(Work, "all", [])

    def single(kind, peer):
        def post(tensor, *, group, tag, **ranks):
            found.append(Operation(kind, ranks[peer], tensor, tag))
            return Work()

        return post

    def batch(operations):
        found.append(operations)
        return [Work()]

    monkeypatch.setattr(dist, "isend", single("send", "group_dst"))
    monkeypatch.setattr(dist, "irecv", single("receive", "group_src"))
    isend, irecv = dist.isend, dist.irecv
    monkeypatch.setattr(
        dist,
        "P2POp",
        lambda op, tensor, *, group, group_peer: Operation({isend: "send", irecv: "receive"}[op], group_peer, tensor),
    )
    monkeypatch.setattr(dist, "batch_isend_irecv", batch)
    monkeypatch.setattr(dist, "get_backend", lambda group: group)
    return found


def run(transport, instructions):
    """Tensors that say of which message and at which place in it they are: shapes are those of the specs."""
    for instruction in transport.arrange(instructions):
        if isinstance(instruction, Exchange):
            for message in instruction.sends:
                transport.offer(message, [torch.full(spec.shape, message.tag, dtype=spec.dtype) for spec in SPECS])
            transport.exchange(instruction.sends, [(message, SPECS) for message in instruction.receives])


LOWERED = [(name, ranks, num) for name in SCHEDULES for ranks, num in ((2, 1), (4, 5), (4, 12))]


@pytest.mark.parametrize(("schedule", "num_ranks", "num_microbatches"), LOWERED)
def test_in_batches_both_ends_post_the_same_tensors_in_the_same_order(schedule, num_ranks, num_microbatches, posted):
    """NCCL matches nothing else. One exchange is one batch."""
    sent, received = defaultdict(list), defaultdict(list)  # (source, target) -> (tag of message, shape)
    for program in lower(build_schedule(schedule, num_ranks, num_microbatches)):
        posted.clear()
        transport = Transport("nccl", CPU)
        run(transport, program.instructions)
        tags = {id(tensor): message.tag for message, (_, mine) in transport._arriving.items() for tensor in mine}
        for operation in (operation for batch in posted for operation in batch):
            tensor = operation.tensor
            if operation.kind == "send":
                sent[program.rank, operation.peer].append((int(tensor.flatten()[0]), tensor.shape))
            else:
                received[operation.peer, program.rank].append((tags[id(tensor)], tensor.shape))
        exchanges = [instruction for instruction in program.instructions if isinstance(instruction, Exchange)]
        assert [len(batch) for batch in posted] == [2 * len(each.messages) for each in exchanges]  # empty ones stay
    assert sent == received and (sent or num_ranks == 1)


@pytest.mark.parametrize(("schedule", "num_ranks", "num_microbatches"), LOWERED)
def test_with_tags_no_two_operations_between_two_ranks_share_one(schedule, num_ranks, num_microbatches, posted):
    sent, received = [], []
    for program in lower(build_schedule(schedule, num_ranks, num_microbatches)):
        posted.clear()
        run(Transport("gloo", CPU), program.instructions)
        for operation in posted:
            shape = (tuple(operation.tensor.shape), operation.tensor.dtype)
            if operation.kind == "send":
                sent.append((program.rank, operation.peer, operation.tag, shape))
            else:
                received.append((operation.peer, program.rank, operation.tag, shape))
    assert len({each[:3] for each in sent}) == len(sent)
    assert sorted(sent, key=str) == sorted(received, key=str)


@pytest.mark.parametrize(("schedule", "num_ranks", "num_microbatches"), LOWERED)
def test_with_tags_receives_come_one_exchange_early_and_nothing_else_changes(
    schedule, num_ranks, num_microbatches, posted
):
    for program in lower(build_schedule(schedule, num_ranks, num_microbatches)):
        assert Transport("nccl", CPU).arrange(program.instructions) == program.instructions
        early = Transport("gloo", CPU).arrange(program.instructions)

        def steps_and_sends(instructions):
            kept = (i.step if isinstance(i, Compute) else i.sends for i in instructions)
            return [each for each in kept if each]

        def receives(instructions):
            return [i.receives for i in instructions if isinstance(i, Exchange) and i.receives]

        assert steps_and_sends(early) == steps_and_sends(program.instructions)
        assert receives(early) == receives(program.instructions)
        before, after = (
            [i.receives for i in each if isinstance(i, Exchange)] for each in (program.instructions, early)
        )
        assert after == [*before, ()] if before else not after


def test_a_rank_alone_has_nothing_to_arrange():
    instructions = lower(build_schedule("dualpipev", 1, 3))[0].instructions
    assert Transport(None, CPU).arrange(instructions) == instructions


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_every_piece_of_work_is_waited_for_once(backend, posted):
    """To gloo, waiting again is waiting for another message."""
    transport = Transport(backend, CPU)
    instructions = lower(build_schedule("dualpipe", 4, 8))[1].instructions
    run(transport, instructions)
    received = [m for i in instructions if isinstance(i, Exchange) for m in i.receives]
    for message in received:
        tensors = transport.take(message)
        assert [(each.shape, each.dtype) for each in tensors] == [(each.shape, each.dtype) for each in SPECS]
    transport.finish()
    assert Work.all and all(work.waited == 1 for work in Work.all)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_tensors_that_were_sent_long_ago_are_let_go_while_the_step_still_runs(backend, posted):
    instructions = lower(build_schedule("gpipe", 2, 40))[0].instructions
    num_sends = sum(len(i.sends) for i in instructions if isinstance(i, Exchange))
    transport = Transport(backend, CPU)
    run(transport, instructions)
    assert num_sends == 40 and len(transport._leaving) == 8


def test_what_is_received_and_never_used_is_an_error(posted):
    transport = Transport("gloo", CPU)
    run(transport, lower(build_schedule("1f1b", 2, 1))[1].instructions)
    with pytest.raises(AssertionError, match=r"never used: .*0F0 from rank 0 to rank 1"):
        transport.finish()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_connection_that_is_lost_tells_what_was_waited_for(backend, posted, monkeypatch):
    def wait(work):
        raise RuntimeError("Connection closed by peer")

    transport = Transport(backend, CPU)
    instructions = lower(build_schedule("1f1b", 2, 1))[1].instructions
    run(transport, instructions)
    (message,) = [m for i in instructions if isinstance(i, Exchange) for m in i.receives]
    monkeypatch.setattr(Work, "wait", wait)
    with pytest.raises(RuntimeError, match="closed by peer") as caught:
        transport.take(message)
    assert caught.value.__notes__ == ["while it waited for 0F0 from rank 0 to rank 1 of its pipeline"]


def test_a_message_has_room_for_64_tensors(posted):
    (message,) = [
        m for i in lower(build_schedule("1f1b", 2, 1))[0].instructions if isinstance(i, Exchange) for m in i.sends
    ]
    with pytest.raises(AssertionError, match="64 tensors"):
        Transport("gloo", CPU).offer(message, [torch.zeros(1)] * 65)


@pytest.mark.parametrize(("backend", "early"), [("gloo", ["send", "send"]), ("nccl", [])])
def test_with_tags_a_message_leaves_as_soon_as_it_is_offered(backend, early, posted):
    (exchange,) = (
        i for i in lower(build_schedule("1f1b", 2, 1))[0].instructions if isinstance(i, Exchange) and i.sends
    )
    transport = Transport(backend, CPU)
    transport.offer(exchange.sends[0], [torch.zeros(spec.shape, dtype=spec.dtype) for spec in SPECS])
    assert [operation.kind for operation in posted] == early
    transport.exchange(exchange.sends, [])
    assert len([operation for batch in posted for operation in (batch if backend == "nccl" else [batch])]) == 2
