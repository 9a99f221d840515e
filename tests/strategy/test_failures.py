"""However one rank fails, all processes end, soon, with an exit code, and the first cause is the last thing printed.

Real processes, as ``devices=N`` and torchrun start them. The machine may be busy: what is asserted is
the 30 seconds that a user would put up with, not how fast it is.
"""

import os
import sys
from collections.abc import Mapping

import lightning as L
import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.callbacks import SaveOnSigterm
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.strategy import interrupts, launcher
from lightning_dualpipe.strategy.failures import LocalRun, Report, first_cause, read_reports, report_failure
from tests.marks import needs_patience
from tests.ranks import run_ranks
from tests.strategy import program
from tests.strategy.programs import MODULE, SCRIPT, TO_END, Ended, Program, run_together
from tests.strategy.runs import pretend_torchrun, write_corpus

THREE = ("--devices", "3", "--strategy", '{"schedule": "1f1b"}')
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT[1])


def failing(command: tuple[str, ...], place: str, rank: int | None, what: str = "raise_") -> Program:
    return Program([command], {"place": place, "rank": rank, "what": what})


def check_gone(ended: Ended, *, code: int = 1) -> None:
    assert ended.codes == [code], ended.error
    assert 0 < ended.seconds < TO_END, ended.error
    assert ended.left_behind == []


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_and_is_told_last(tmp_path):
    ended = run_together(
        {
            "rank 2 of 4": failing((*SCRIPT, "--devices", "4", "--save"), "training_step", 2),
            "main, reading data": failing((*SCRIPT, "--save"), "dataset", 0),
            "main hangs": failing(SCRIPT, "callback", None, "hang_or_raise"),
            "before they have met": failing(SCRIPT, "before fit", 1, "import_"),
            "after training": failing(SCRIPT, "after fit", 1),
        },
        tmp_path,
    )
    failed = {
        "rank 2 of 4": "rank 2 failed first: ArithmeticError: the sky is falling",
        "main, reading data": "rank 0 failed first: ArithmeticError: the sky is falling",
        "main hangs": "rank 1 failed first: ArithmeticError: the sky is falling",
        "before they have met": "rank 1 failed first: ModuleNotFoundError: No module named 'no_such_package'",
        "after training": "rank 1 failed first: ArithmeticError: the sky is falling",
    }
    for name, cause in failed.items():
        check_gone(ended[name])
        assert ended[name].last_words == f"lightning-dualpipe: {cause}\n"
        assert ended[name].error.count("Traceback") == 1  # of the cause; the others lost a peer, which is one line
    assert "lost its connection" in ended["rank 2 of 4"].error
    everywhere = {path.name for path in ended["rank 2 of 4"].folder.glob("on_exception-*")}
    assert everywhere == {f"on_exception-{rank}" for rank in range(4)}  # callbacks have had their turn
    saved = {path.name for path in (ended["rank 2 of 4"].folder / "checkpoints").iterdir()}
    assert saved == {
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
    }  # save_on_exception neither hung nor left half a file


@pytest.mark.slow
def test_a_rank_that_dies_or_leaves_ends_all_and_training_goes_on_from_the_last_checkpoint(tmp_path):
    corpus = write_corpus(tmp_path)
    ended = run_together(
        {
            "killed": failing((*MODULE, "--save", "--corpus", corpus), "training_step", 1, "die"),
            "main killed": failing((*SCRIPT, *THREE, "--workers", "1"), "callback", 1, "kill_main_and_hang"),
            "main dies": failing(SCRIPT, "training_step", 0, "die"),
            "left": failing((*SCRIPT, "--careless"), "callback", 1, "leave"),
        },
        tmp_path,
    )
    check_gone(ended["killed"])
    assert ended["killed"].last_words.startswith("lightning-dualpipe: rank 1 was killed by SIGKILL")
    for name in ("main killed", "main dies"):
        check_gone(ended[name], code=-9)
        assert ended[name].last_words.startswith("lightning-dualpipe: rank 0 is gone without a word")
    assert "caught RuntimeError" in ended["left"].output
    check_gone(ended["left"], code=0)  # the script's own decision
    # or, where its threads were in the middle of a message, the interpreter did not get to its end
    left = ("rank 1 had left with exit code 0", "rank 1 was killed by SIGABRT")
    assert any(words in ended["left"].last_words for words in left)

    whole = program.train(["--strategy", "null", "--devices", "1", "--corpus", corpus])
    checkpoint = str(ended["killed"].folder / "checkpoints/epoch=0-step=4.ckpt")
    resumed = run_ranks(2, resume, corpus, checkpoint, timeout=120)
    assert len(ended["killed"].losses) == 5 and len(whole) == 8
    torch.testing.assert_close(ended["killed"].losses, whole[:5], rtol=0, atol=1e-9)
    for losses in resumed:
        torch.testing.assert_close(losses, whole[4:], rtol=0, atol=1e-9)


def resume(rank: int, corpus: str, checkpoint: str | None) -> list[float]:
    pretend_torchrun(rank, 2)
    return program.train(["--corpus", corpus, *(["--resume", checkpoint] if checkpoint else [])])


@pytest.mark.slow
def test_a_signal_to_end_ends_all(tmp_path):
    ended = run_together(
        {
            "Ctrl+C, several times": failing(SCRIPT, "callback", 1, "press_ctrl_c"),
            "to main alone, which waits in C": failing(SCRIPT, "callback", 1, "interrupt_main_and_hang"),
            "SIGTERM to main alone": failing(SCRIPT, "callback", 1, "terminate_main"),
        },
        tmp_path,
    )
    check_gone(ended["Ctrl+C, several times"])
    assert ended["Ctrl+C, several times"].last_words.endswith("stopped by SIGINT\n")
    check_gone(ended["to main alone, which waits in C"])
    assert ended["to main alone, which waits in C"].last_words.endswith("rank 0 stopped by SIGINT\n")
    check_gone(ended["SIGTERM to main alone"], code=143)
    assert ended["SIGTERM to main alone"].last_words.endswith("stopped by SIGTERM\n")
    assert "Traceback" not in "".join(each.error for each in ended.values())


@needs_patience
@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_and_goes_on_to_the_same_end(tmp_path):
    corpus = write_corpus(tmp_path)
    saving = ("--save-on-sigterm", "--corpus", corpus)
    ended = run_together(
        {
            "main alone": failing((*MODULE, *saving), "callback", 1, "terminate_main"),
            "torchrun": failing((*TORCHRUN, *saving), "training_step", 1, "terminate_main"),  # the agent
            "a long batch": failing((*TORCHRUN, *saving), "training_step", 1, "terminate_main_and_take_long"),
        },
        tmp_path,
    )
    check_gone(ended["main alone"], code=143)
    assert ended["main alone"].last_words.endswith("stopped by SIGTERM\n")
    for name in ("torchrun", "a long batch"):
        assert ended[name].codes != [0] and 0 < ended[name].seconds < TO_END
    undisturbed = run_ranks(2, resume, corpus, None, timeout=120)[0]
    for each in ended.values():
        checkpoint = str(each.folder / "checkpoints/sigterm.ckpt")
        losses = run_ranks(2, resume, corpus, checkpoint, timeout=120)[0]
        assert each.losses + losses == undisturbed  # to the last bit
        assert 0 < len(losses) < len(undisturbed)


@pytest.mark.parametrize("saves", [True, False])
def test_under_torchrun_a_rank_in_a_long_call_is_given_up_later_where_it_then_saves(monkeypatch, saves):
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[SaveOnSigterm("saved")] * saves)
    monkeypatch.setattr(interrupts, "_running", None)
    interrupts.stop_between_batches(trainer)

    class Unheard:
        since = 0.0

        def seconds(self) -> float:
            return self.since

        def wait(self, _: float) -> None:
            self.since += 1.0

    def leave(code: int) -> None:
        raise SystemExit(code)

    unheard = Unheard()
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="143"):
        launcher._heed_torchrun(unheard, 0)  # type: ignore[arg-type]
    assert unheard.since == (26 if saves else 5)  # torchrun kills after 30


@pytest.mark.slow
def test_under_torchrun_its_summary_names_the_root_cause(tmp_path):
    ended = run_together(
        {
            "raises": failing(TORCHRUN, "training_step", 1),
            "killed": failing(TORCHRUN, "training_step", 1, "die"),
        },
        tmp_path,
    )
    for each in ended.values():
        assert each.codes == [1]
        assert 0 < each.seconds < TO_END
    root_cause = ended["raises"].error.rpartition("Root Cause")[2]
    assert "rank      : 1 " in root_cause and "ArithmeticError: the sky is falling" in root_cause
    root_cause = ended["killed"].error.rpartition("Root Cause")[2]
    assert "rank      : 1 " in root_cause and "Signal 9 (SIGKILL)" in root_cause


def test_a_program_that_cannot_start_its_ranks_leaves_nothing_behind(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("subprocess.Popen", refuse)
    with pytest.raises(OSError, match="no more processes"):
        program.train(["--devices", "2"])
    del os.environ["LIGHTNING_DUALPIPE_RUN"]  # no matter in a program, which ends here


# ---- the first cause, without processes -----------------------------------------------------------


def error(rank: int, when: float, text: str = "ValueError: no") -> Report:
    return Report(rank, when, "error", text, f"Traceback ...\n{text}\n", shown=True)


def lost(rank: int, when: float) -> Report:
    return Report(rank, when, "lost peer", "RuntimeError: closed by peer", "Traceback ...\n")


CAUSES: Mapping[str, tuple[list[Report], dict[int, int | None], str | None]] = {
    "nothing failed": ([], {1: 0, 2: 0}, None),
    "an error before its consequences": ([error(2, 1), lost(0, 2)], {2: 1}, "rank 2 failed first: ValueError: no"),
    "a consequence noticed first": ([lost(0, 1), error(2, 2)], {2: 1}, "rank 2 failed first: ValueError: no"),
    "the same error everywhere": ([error(1, 1), error(0, 2)], {1: 1}, "ranks 0, 1 failed: ValueError: no"),
    "the first of two errors": ([error(1, 1, "A: a"), error(0, 2)], {1: 1}, "rank 1 failed first: A: a"),
    "killed": ([lost(0, 1)], {1: 1, 2: -9}, "rank 2 was killed by SIGKILL (the system does that when memory runs out)"),
    "a crash": ([lost(0, 1)], {1: -11}, "rank 1 was killed by SIGSEGV"),
    "a code": ([], {1: 2}, "rank 1 exited with code 2, its own output above says why"),
    "an unknown signal": ([], {1: -200}, "rank 1 was killed by signal 200"),
    "the main process": ([lost(1, 1)], {0: None}, "rank 0 is gone without a word: it was killed, or crashed"),
    "an error before a death": ([error(0, 1)], {1: -9}, "rank 0 failed first: ValueError: no"),
    "the other node": (
        [lost(3, 1), lost(2, 2)],
        {},
        "rank 3 lost its connection to another rank; the cause is on another node, whose output tells it. "
        "RuntimeError: closed by peer",
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_the_first_cause_is_the_earliest_that_is_no_consequence(case):
    reports, ended, cause = CAUSES[case]
    assert first_cause(reports, ended) == cause


def test_a_traceback_that_nobody_has_printed_is_told_with_the_cause():
    report = Report(1, 0.0, "error", "ValueError: no", "Traceback ...\nValueError: no\n")
    assert first_cause([report], {}) == "Traceback ...\nValueError: no\nrank 1 failed first: ValueError: no"


GLOO = "[/builds/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
KINDS: list[tuple[BaseException, str]] = [
    (
        RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:5519. Check the logs of the remote worker"),
        "lost peer",
    ),
    (RuntimeError(GLOO + "Read error [127.0.0.1]:5519: Connection reset by peer"), "lost peer"),
    (RuntimeError(GLOO + "Timed out waiting 1800000ms for recv operation to complete"), "lost peer"),
    (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited"), "lost peer"),
    (RuntimeError(GLOO + "op.preamble.length <= op.nbytes. 8 vs 4"), "error"),  # ranks that disagree
    (RuntimeError("Connection closed by peer"), "error"),  # somebody else's connection
    (KeyboardInterrupt(), "interrupt"),
    (SystemExit(3), "error"),
]


@pytest.fixture
def folder(tmp_path):
    """This process is the main process of a run."""
    LocalRun(os.getpid(), tmp_path).announce()
    yield tmp_path
    del os.environ["LIGHTNING_DUALPIPE_RUN"]


def test_a_rank_that_merely_lost_a_peer_is_told_from_one_that_failed(folder):
    for rank, (failure, _) in enumerate(KINDS):
        report_failure(failure, rank=rank)
    found = {report.rank: report.kind for report in read_reports(folder)}
    assert list(found.values()) == [kind for _, kind in KINDS]


def test_what_is_raised_because_a_peer_was_lost_is_a_consequence_too(folder):
    for rank, suppressed in enumerate((False, True)):
        try:
            try:
                raise KINDS[0][0]
            except RuntimeError as lost_peer:
                raise ValueError("the step failed") from (None if suppressed else lost_peer)
        except ValueError as failure:
            report_failure(failure, rank=rank)
    assert [report.kind for report in read_reports(folder)] == ["lost peer", "error"]


def test_the_first_failure_of_a_rank_counts_and_leaving_is_none(folder):
    report_failure(SystemExit(0), rank=0)
    assert read_reports(folder) == []
    report_failure(ValueError("first"), rank=0)
    report_failure(ValueError("second"), rank=0)
    assert [report.error for report in read_reports(folder)] == ["ValueError: first"]


def test_a_configuration_error_is_told_without_a_traceback(folder):
    report_failure(ConfigurationError.of("strategy cannot run", ["a is 3, it must be even"]), rank=1)
    assert first_cause(read_reports(folder), {}) == (
        "rank 1 failed first: ConfigurationError: strategy cannot run:\n  - a is 3, it must be even"
    )


def test_a_process_that_only_inherited_the_environment_writes_no_report(folder):
    worker = os.fork()
    if not worker:
        report_failure(ValueError("of a data worker"), rank=0)
        os._exit(0)
    os.waitpid(worker, 0)
    assert read_reports(folder) == []


def test_torchrun_takes_an_error_for_the_root_cause_before_a_lost_peer(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def failed(rank: int) -> ProcessFailure:
        return ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=str(tmp_path / f"{rank}.json"))

    for rank, failure in ((0, KINDS[0][0]), (1, ValueError("the cause"))):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        report_failure(failure, rank=rank)
    silent = ProcessFailure(local_rank=2, pid=1, exitcode=-9, error_file="none")
    assert ChildFailedError("train", {0: failed(0), 1: failed(1)}).get_first_failure()[0] == 1
    assert ChildFailedError("train", {0: failed(0), 2: silent}).get_first_failure()[0] == 2
