"""SIGTERM, to whichever rank: all save, all end, and a run that goes on ends where an undisturbed one does."""

import os
import signal
import time
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dualpipe import newest_checkpoint
from lightning_dualpipe.callbacks import SaveOnSigterm
from tests.ranks import Cases
from tests.strategy.runs import Recorder, Run, build, write_corpus

STEPS, TERMINATED_AT = 4, 2
PP2 = {"pipeline_parallel_size": 2}


class Terminate(L.Callback):
    """Sends the signal to this rank in the middle of a batch."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == TERMINATED_AT and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher whose whole group has got it


def interrupted(rank: int, run: Run, folder: str) -> tuple[Any, str | None, list[float], list[float], list[float]]:
    """Exit code, what newest_checkpoint finds, losses before, afterwards, and without an interruption."""
    os.chdir(folder)
    before, code = Recorder(), None
    trainer, module, data = build(rank, run, callbacks=[SaveOnSigterm("saved"), before, Terminate(run.world - 1)])
    usual = signal.getsignal(signal.SIGTERM)
    try:
        trainer.fit(module, data)
    except SIGTERMException as ended:
        code = ended.code
    assert signal.getsignal(signal.SIGTERM) == usual
    after, undisturbed = Recorder(), Recorder()
    source = newest_checkpoint("saved")
    trainer, module, data = build(rank, run, callbacks=[SaveOnSigterm("saved"), after, Terminate(None)])
    trainer.fit(module, data, ckpt_path=source)
    trainer, module, data = build(rank, run, callbacks=[undisturbed])
    trainer.fit(module, data)
    return code, source, before.losses, after.losses, undisturbed.losses


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("sigterm")
    corpus = write_corpus(folder)

    def case(name: str, **options: Any) -> tuple[Run, str]:
        (folder / name).mkdir()
        return Run(model="your own", steps=STEPS, corpus=corpus, precision="32-true", **options), str(folder / name)

    saves_beside = {**PP2, "save_distributed_checkpoint": "async"}
    two = {
        "ddp": case("ddp", world=2, strategy="ddp"),
        "dualpipe": case("dualpipe", world=2, strategy=saves_beside),
        "accumulated": case("accumulated", world=2, strategy=PP2, accumulate=2),
    }
    results = Cases(2, interrupted, two, timeout=120)
    return {"auto": [interrupted(0, *case("auto"))], **{name: results[name] for name in two}}


@pytest.mark.parametrize("name", ["auto", "ddp", "dualpipe", "accumulated"])
def test_all_ranks_save_and_end_and_the_run_goes_on_to_the_same_end(outcomes: Any, name: str) -> None:
    for code, source, before, after, undisturbed in outcomes[name]:
        assert code == 143
        assert source == "saved/sigterm.ckpt"
        assert before + after == undisturbed  # to the last bit
        # with two batches to a step, the one that makes up a step with this one comes first
        assert len(before) == TERMINATED_AT + (2 if name == "accumulated" else 1)


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if not child:
        guard = SaveOnSigterm("saved")
        signal.signal(signal.SIGTERM, guard.note)
        os.kill(os.getpid(), signal.SIGTERM)
        guard._first -= 10  # seconds ago
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
