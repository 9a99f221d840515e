import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from lightning_dualpipe.data import BYTE_VOCABULARY, BatchSizeRamp, TextDataModule
from lightning_dualpipe.errors import ConfigurationError
from tests.data.recorder import Recorder, corpus, data, signature, trainer
from tests.data.test_tokenizers import trained_file
from tests.ranks import run_ranks


def test_nothing_is_read_until_it_is_needed(tmp_path: Path) -> None:
    untouched = TextDataModule(tmp_path / "missing.txt", cache_dir=tmp_path / "cache")
    assert untouched.vocab_size == BYTE_VOCABULARY
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match=r"missing\.txt' does not exist"):
        untouched.prepare_data()


def test_batches_are_inputs_and_the_tokens_after_them(tmp_path: Path) -> None:
    for batch in data(tmp_path, num_workers=1).train_dataloader():
        for tensor in batch.values():
            assert tensor.shape == (8, 16) and tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_a_pass_reads_each_training_sequence_once_and_no_validation_text(tmp_path: Path) -> None:
    module_data = data(tmp_path, batch_size=5)
    sequences = [sample for batch in module_data.train_dataloader() for sample in signature(batch)]
    expected = {tuple(row) for row in module_data.train_dataset()[range(95)]["input_ids"].tolist()}
    assert len(module_data.train_dataset()) == 95 == len(sequences)
    assert set(sequences) == expected and len(expected) == 95
    held_out = [sample for batch in module_data.val_dataloader() for sample in signature(batch)]
    assert len(held_out) == len(module_data.validation_dataset()) and not expected & set(held_out)
    assert module_data.num_train_tokens + module_data.num_validation_tokens == 1904


def test_reading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    module_data = data(tmp_path)
    before = torch.get_rng_state()
    for loader in (module_data.train_dataloader(), module_data.val_dataloader()):
        for _ in loader:
            pass
    assert torch.equal(torch.get_rng_state(), before)


def test_the_standard_library_is_the_default_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for name in ("json/decoder.py", "abc.py", "bisect.py"):  # a part of it, to be quick
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(Path(sysconfig.get_path("stdlib"), name).read_text())
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    module, module_data = Recorder(), TextDataModule(cache_dir=tmp_path / "cache", batch_size=2)
    trainer(max_steps=4).fit(module, module_data)
    text = module_data.tokenizer.decode([token for batch in module.seen for row in batch for token in row])
    assert "def " in text and "return" in text


def test_text_may_come_from_lines_and_a_tokenizer_file(tmp_path: Path) -> None:
    file = trained_file(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    (tmp_path / "a.jsonl").write_text('{"body": "def f(x):"}\n' * 50)
    module_data = TextDataModule(
        tmp_path / "a.jsonl", 8, batch_size=2, tokenizer=file, text_key="body", cache_dir=tmp_path / "cache"
    )
    batch = next(iter(module_data.train_dataloader()))
    assert module_data.vocab_size > BYTE_VOCABULARY
    assert "def f(x):" in module_data.tokenizer.decode(batch["input_ids"][0].tolist())


def test_validate_test_and_predict_read_all_that_was_held_out(tmp_path: Path) -> None:
    module, module_data = Recorder(), data(tmp_path)
    trainer().validate(module, module_data, verbose=False)
    validated = [sample for batch in module.validated for sample in batch]
    trainer().test(module, module_data, verbose=False)
    assert [len(batch) for batch in module.validated] == [8, 8, 7]
    predicted: Any = trainer().predict(module, module_data)
    assert [tuple(row) for batch in predicted for row in batch.tolist()] == validated
    assert len(set(validated)) == 23 == len(module_data.validation_dataset())


def test_a_run_without_validation_is_possible(tmp_path: Path) -> None:
    module, module_data = Recorder(), data(tmp_path, validation_fraction=0)
    trainer(max_epochs=2, num_sanity_val_steps=2).fit(module, module_data)
    assert module.validated == [] and module_data.num_validation_tokens == 0
    assert len(module.seen) == 2 * (len(module_data.train_dataset()) // 8)


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    module = Recorder()
    trainer(max_epochs=3, overfit_batches=2).fit(module, data(tmp_path))
    assert len(module.seen) == 6 and module.seen[:2] == module.seen[2:4] == module.seen[4:]


def test_the_batch_size_follows_its_schedule(tmp_path: Path) -> None:
    module = Recorder()
    ramp = BatchSizeRamp(2, 8, tokens=500, increment=2)
    trainer(max_steps=25).fit(module, data(tmp_path, batch_size_schedule=ramp))
    sizes = [len(batch) for batch in module.seen]
    consumed = [16 * sum(sizes[:step]) for step in range(25)]
    assert sizes == [min(2 + 2 * (tokens * 3 // 500), 8) for tokens in consumed]
    assert sizes[0] == 2 and sizes[-1] == 8


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction=-0.1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"eos_token": "</s>"}, "eos_token='</s>' is for a tokenizer file"),
        ({"batch_size": 0, "sequence_length": -3}, "(?s)sequence_length=-3.*batch_size=0"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused_at_once(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        TextDataModule(**options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"path": "missing"}, "missing' does not exist"),
        ({"path": "empty.txt"}, "no text"),
        ({"path": "binary.txt"}, r"binary\.txt is not a UTF-8 text file.*offset 3"),
        ({"path": "lines.jsonl"}, r"lines\.jsonl:2 has no key 'text'"),
        ({"path": "short.txt", "sequence_length": 512}, r"(?s)sequence_length=512.*training.*of 41 tokens.*takes 513"),
        ({"path": "short.txt", "validation_fraction": 0.1}, "(?s)no validation.*validation split has 4 of 41"),
        ({"path": "short.txt", "validation_fraction": 0, "batch_size": 9}, "5 sequences of 8 tokens.*takes 9"),
        ({"path": "short.txt", "tokenizer": "missing.json"}, r"missing\.json' cannot be read"),
        ({"path": "short.txt", "cache_dir": "short.txt/x"}, "give another cache_dir"),
    ],
    ids=str,
)
def test_data_that_cannot_be_trained_on_are_refused_before_training(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"abc\xff")
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"other": "b"}\n')
    (tmp_path / "short.txt").write_text("just a few words, hardly a corpus yet..")
    module = Recorder()
    usual: dict[str, Any] = {"sequence_length": 8, "batch_size": 2, "cache_dir": "cache"}  # tests run in tmp_path
    with pytest.raises(ConfigurationError, match=why):
        trainer(max_steps=1).fit(module, TextDataModule(**usual | options))
    assert module.seen == []


def test_what_it_holds_is_said_in_a_line(tmp_path: Path) -> None:
    module_data = data(tmp_path)
    assert str(module_data) == f"TextDataModule(path={tmp_path / 'corpus'!r})"
    module_data.setup()
    assert "16 documents, 1,904 tokens; 95 sequences of 16 to train and 23 to validate" in str(module_data)


# ---- several processes ------------------------------------------------------------------------


class OnePipeline(DDPStrategy):
    """Two processes that share each batch, as the ranks of one pipeline do: the first reads, the other receives."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}

    def process_dataloader(self, dataloader: Any) -> Any:
        return FirstReads(dataloader)


class FirstReads:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        own = iter(self.loader)
        for _ in range(len(self)):
            box = [next(own)] if dist.get_rank() == 0 else [None]
            dist.broadcast_object_list(box)
            yield box[0]


def read_on_rank(rank: int, folder: Path) -> tuple[Any, Any, str]:
    os.environ["LOCAL_RANK"] = str(rank)  # processes are there already; Lightning starts none
    module = Recorder()
    module_data = data(folder)
    trainer(max_steps=5, devices=2, strategy=OnePipeline()).fit(module, module_data)
    state = module_data.state_dict()

    (folder / f"corpus-{rank}.txt").write_text(f"text of node {rank}, " * 100)
    own = TextDataModule(folder / f"corpus-{rank}.txt", 16, batch_size=2, cache_dir=folder / "cache")
    try:
        trainer(max_steps=1, devices=2, strategy="ddp").fit(Recorder(), own)
    except ConfigurationError as error:
        return module.seen, state, str(error)
    return module.seen, state, "no error"


def test_the_strategy_says_who_reads_what_and_all_must_have_the_same_corpus(tmp_path: Path) -> None:
    alone = Recorder()
    module_data = data(tmp_path)
    trainer(max_steps=5).fit(alone, module_data)
    ranks = run_ranks(2, read_on_rank, tmp_path)
    assert [seen for seen, _, _ in ranks] == [alone.seen, alone.seen]
    assert [state for _, state, _ in ranks] == [module_data.state_dict()] * 2  # of the rank that did not read, too
    assert all("the processes have different corpora" in error for _, _, error in ranks)


# ---- the command line -------------------------------------------------------------------------

CONFIG = """
data:
  class_path: lightning_dualpipe.TextDataModule
  init_args:
    path: [{corpus}]
    sequence_length: 16
    batch_size: 4
    batch_size_schedule: {{start: 2, end: 4, tokens: 100}}
    cache_dir: {cache}
"""


def cli(*arguments: str) -> Any:
    return LightningCLI(
        Recorder,
        subclass_mode_data=True,
        args=["fit", *arguments],
        save_config_callback=None,
        trainer_defaults={"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "train.yaml"
    file.write_text(CONFIG.format(corpus=corpus(tmp_path), cache=tmp_path / "cache"))
    return file


def test_a_stock_command_line_takes_it_from_yaml(config: Path) -> None:
    done = cli("--config", str(config), "--data.batch_size", "3", "--data.batch_size_schedule.end", "5")
    assert done.datamodule.batch_size == 3
    assert done.datamodule.batch_size_schedule == BatchSizeRamp(2, 5, tokens=100)
    assert [len(batch) for batch in done.model.seen] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--data.batch_size", "eight"], "batch_size"),
        (["--data.sequence_lenght", "8"], "sequence_lenght"),
        (["--data.batch_size_schedule.tokens", "many"], "tokens"),
        (["--data.batch_size_schedule.end", "1"], "1 <= start <= end"),
        (["--data.batch_size", "0"], "batch_size=0: at least 1"),
    ],
    ids=str,
)
def test_a_typing_error_on_the_command_line_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    with pytest.raises((SystemExit, ValueError)) as raised:  # what a class raises arrives as a ValueError around it
        cli("--config", str(config), *arguments)
    assert why in capsys.readouterr().err + str(raised.value)


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--data.help=lightning_dualpipe.TextDataModule")
    text = " ".join(capsys.readouterr().out.split())
    assert "a file, a folder, a glob, or a list of these" in text
    assert "how much of the tokens to hold out" in text


def test_its_settings_survive_yaml(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--config", str(config), "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert printed["batch_size_schedule"] == {"start": 2, "end": 4, "tokens": 100, "increment": 1}
    assert printed["seed"] == 0 and printed["tokenizer"] is None
