"""Ranks are killed at any moment while they save: what is there loads, whole, and is the last or the one before."""

import os
import random
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.checkpoint.directory import put_in_place
from lightning_dualpipe.checkpoint.index import Key
from lightning_dualpipe.checkpoint.stored import open_stored, read_whole
from lightning_dualpipe.checkpoint.writer import Contents, Piece, save
from tests.checkpoint.damage import write
from tests.ranks import CONTEXT

ELEMENTS = 1 << 20  # float64: a save takes some milliseconds, half of them in writing


def save_for_ever(rank: int, folder: str, world: int) -> None:
    """One checkpoint after the other under one name, each full of the number of its step; reports what is in place."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    share = ELEMENTS // world
    step = 0
    while True:
        step += 1
        values = torch.full((share,), step, dtype=torch.float64)
        piece = Piece(Key("state_dict", "weight"), (ELEMENTS,), rank * share, values)
        contents = Contents({"global_step": step}, {"weight": "weight"}, step, "test")
        save([piece], contents, Path(folder) / "latest.ckpt", dist.group.WORLD, rank=rank)
        if rank == 0:
            (Path(folder) / "next").write_text(str(step))
            os.replace(Path(folder) / "next", Path(folder) / "step")  # or a kill in between would report nothing


def kill_once(folder: Path, generator: random.Random) -> tuple[int, int]:
    """The last step that was reported as saved, and the one that is found."""
    folder.mkdir()
    workers = [CONTEXT.Process(target=save_for_ever, args=(rank, str(folder), 2), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        deadline = time.monotonic() + 120
        while not (folder / "step").exists():
            assert time.monotonic() < deadline and all(worker.is_alive() for worker in workers)
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        generator.choice(workers).kill()
        time.sleep(generator.uniform(0.0, 0.05))  # the other one goes on for a moment
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
            worker.close()
    reported = int((folder / "step").read_text())
    found = read_whole(folder / "latest.ckpt")
    assert torch.equal(found["state_dict"]["weight"], torch.full((ELEMENTS,), found["global_step"]).double())
    assert open_stored(folder / "latest.ckpt").manifest.step == found["global_step"]
    return reported, found["global_step"]


def check(kills: int, folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    for number in range(kills):
        reported, found = kill_once(folder / str(number), generator)
        assert found in (reported, reported + 1), "the last that was in place, or one that came after the report"


def test_a_save_that_is_killed_leaves_the_last_or_the_one_before(tmp_path: Path) -> None:
    check(3, tmp_path, seed=1)


@pytest.mark.slow
def test_twenty_saves_that_are_killed_leave_no_torn_checkpoint(tmp_path: Path) -> None:
    check(20, tmp_path, seed=2)


def test_what_a_killed_save_leaves_goes_with_the_next(tmp_path: Path) -> None:
    write(0, str(tmp_path / "a.ckpt"), 1)
    for left in (".a.ckpt.writing-1234", ".a.ckpt.removed-77", ".b.ckpt.writing-1"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rank-00000.safetensors").touch()
    write(0, str(tmp_path / "a.ckpt"), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.ckpt.writing-1", "a.ckpt"]
    assert read_whole(tmp_path / "a.ckpt")["global_step"] == 2


def test_where_names_cannot_be_exchanged_the_one_before_is_found_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_dualpipe.checkpoint import directory

    monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    write(0, str(tmp_path / "a.ckpt"), 1)
    write(0, str(tmp_path / "a.ckpt"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert read_whole(tmp_path / "a.ckpt")["global_step"] == 2
    original, calls = os.rename, []

    def die_at_the_second(*names: Path) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*names)

    write(0, str(tmp_path / "new"), 3)
    monkeypatch.setattr(os, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(tmp_path / "new", tmp_path / "a.ckpt", "3")
    monkeypatch.undo()
    assert not (tmp_path / "a.ckpt").exists()
    assert read_whole(tmp_path / "a.ckpt")["global_step"] == 2
    write(0, str(tmp_path / "a.ckpt"), 4)
    assert read_whole(tmp_path / "a.ckpt")["global_step"] == 4


def test_a_file_and_a_link_are_replaced_like_a_directory(tmp_path: Path) -> None:
    write(0, str(tmp_path / "real.ckpt"), 1)
    (tmp_path / "file.ckpt").write_text("one file, as it was saved before")
    (tmp_path / "link.ckpt").symlink_to("real.ckpt")
    for name in ("file.ckpt", "link.ckpt"):
        write(0, str(tmp_path / name), 2)
        assert (tmp_path / name).is_dir() and not (tmp_path / name).is_symlink()
        assert read_whole(tmp_path / name)["global_step"] == 2
    assert read_whole(tmp_path / "real.ckpt")["global_step"] == 1, "what the link led to stays"
