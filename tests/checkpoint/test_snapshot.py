"""What was taken is what is written, whatever happens to it afterwards."""

import threading

import pytest
import torch
from torch import Tensor

from lightning_dualpipe import CheckpointError
from lightning_dualpipe.checkpoint import snapshot
from lightning_dualpipe.checkpoint.index import Key
from lightning_dualpipe.checkpoint.snapshot import Snapshots
from lightning_dualpipe.checkpoint.writer import Piece


def piece(name: str, values: Tensor, *, steady: bool = False) -> Piece:
    return Piece(Key("state_dict", name), tuple(values.shape), 0, values, steady=steady)


def contents(*values: float) -> list[Tensor]:
    return [torch.full((3, 2), value, dtype=torch.float32) for value in values]


def test_weights_may_be_written_to_at_once_and_the_rest_after_settling() -> None:
    weight, moment = contents(1, 2)
    snapshots = Snapshots()
    taken = snapshots.take([piece("w", weight), piece("m", moment, steady=True)])
    weight.data.fill_(-1)  # behind the counter of writes
    snapshots.settle()
    moment.data.fill_(-1)
    found = {each.key.name: each.values for each in taken}
    assert found["w"].eq(1).all() and found["m"].eq(2).all()


def test_the_next_one_has_the_same_memory_and_new_shapes_have_new() -> None:
    weight, moment = contents(1, 2)
    snapshots = Snapshots()
    first = [each.values for each in snapshots.take([piece("w", weight), piece("m", moment, steady=True)])]
    weight += 1
    second = [each.values for each in snapshots.take([piece("w", weight), piece("m", moment[:1], steady=True)])]
    assert second[0].data_ptr() == first[0].data_ptr() and second[0].eq(2).all()
    assert second[1].shape == (1, 2) and second[1].eq(2).all()
    snapshots.release()
    (third,) = snapshots.take([piece("w", weight.bfloat16())])
    assert third.values.dtype == torch.bfloat16 and third.values.eq(2).all()


def test_whoever_writes_too_early_fails_the_save_and_not_training() -> None:
    (moment,) = contents(2)
    snapshots = Snapshots()
    taken = snapshots.take([piece("m", moment, steady=True)])
    moment += 1
    snapshots.settle()
    with pytest.raises(CheckpointError, match="state_dict/m was written to while it was being saved, and not by"):
        list(taken)


def test_settling_waits_for_a_copy_that_another_thread_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training comes to the step while the thread is within the first of two copies."""
    begun, go_on = threading.Event(), threading.Event()
    original = snapshot._copy

    def copy(*args: object) -> None:
        begun.set()
        assert go_on.wait(60)
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "_copy", copy)
    one, two = contents(1, 2)
    snapshots = Snapshots()
    taken = snapshots.take([piece("1", one, steady=True), piece("2", two, steady=True)])
    found: list[Piece] = []
    writer = threading.Thread(target=lambda: found.extend(taken))
    writer.start()
    assert begun.wait(60)
    threading.Timer(0.05, go_on.set).start()
    snapshots.settle()
    assert go_on.is_set()
    one.fill_(-1)
    two.fill_(-1)
    writer.join(60)
    assert [float(each.values.mean()) for each in found] == [1, 2]


def test_a_copy_that_was_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (moment,) = contents(2)
    snapshots = Snapshots()
    list(snapshots.take([piece("m", moment, steady=True)]))
    moment += 1
    taken = snapshots.take([piece("m", moment, steady=True)])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(snapshot, "_copy", interrupted)
        snapshots.settle()
    assert [float(each.values.mean()) for each in taken] == [3]


def test_what_counts_no_writes_is_copied_at_once() -> None:
    with torch.inference_mode():
        (state,) = contents(2)
    taken = Snapshots().take([piece("m", state, steady=True)])
    with torch.inference_mode():
        state += 1
    assert all(each.values.eq(2).all() for each in taken)
