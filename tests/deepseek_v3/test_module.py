"""The LightningModule around the model: what it is made from, what it refuses, and what it exports."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dualpipe import DeepSeekV3, DeepSeekV3Config, DualPipeStrategy, TextDataModule
from lightning_dualpipe.callbacks import Throughput
from lightning_dualpipe.data.tokenizers import BYTE_BOS, BYTE_EOS, BYTE_PAD, ByteTokenizer
from lightning_dualpipe.deepseek_v3.count import training_flops
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.metrics import CountsFlops
from tests.ranks import run_ranks
from tests.strategy.runs import QUIET, SHAPE, pretend_torchrun, write_corpus

BYTES = {"bos_token_id": BYTE_BOS, "eos_token_id": BYTE_EOS, "pad_token_id": BYTE_PAD}


def module(**overrides: Any) -> DeepSeekV3:
    return DeepSeekV3("tiny", {**SHAPE, "num_hidden_layers": 2, **overrides}, warmup_steps=2)  # type: ignore[arg-type]


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "max_steps": 2, **QUIET, **options})


def data(folder: Path, **options: Any) -> TextDataModule:
    options = {"sequence_length": 16, "batch_size": 4, "cache_dir": folder / "cache", **options}
    return TextDataModule(write_corpus(folder), **options)


# ---- its configuration ----------------------------------------------------------------------------


def test_a_whole_configuration_takes_no_preset_and_no_overrides_beside_it() -> None:
    config = DeepSeekV3Config.from_preset("tiny")
    assert DeepSeekV3(config=config).config == config == DeepSeekV3().config
    for given in ({"preset": "small"}, {"preset": "tiny"}, {"overrides": {"num_hidden_layers": 2}}):
        with pytest.raises(ConfigurationError, match=r"have no effect beside config.*with_overrides"):
            DeepSeekV3(config=config, **given)  # type: ignore[arg-type]


def test_imported_settings_can_be_overridden_and_misspelt_ones_are_named(tmp_path: Path) -> None:
    module().save_pretrained(tmp_path, dtype="float32")
    overrides: Any = {"initializer_range": 0.5, "mtp_loss_weight": 0.1}
    again = DeepSeekV3.from_pretrained(tmp_path, overrides=overrides)
    assert again.config == module().config.with_overrides(**overrides) != module().config
    with pytest.raises(ConfigurationError, match=r"initializer_rang=.*did you mean 'initializer_range'"):
        DeepSeekV3.from_pretrained(tmp_path, overrides={"initializer_rang": 0.5})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(ConfigurationError, match=r"preset='small'.*no effect beside pretrained"):
        DeepSeekV3.from_pretrained(tmp_path, preset="small")


# ---- what it refuses before it trains -------------------------------------------------------------


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_data_that_the_model_has_no_place_for_are_refused(run: str, tmp_path: Path) -> None:
    small = module(vocab_size=200, max_position_embeddings=8)
    small.training_step = small.validation_step = lambda *_: pytest.fail("a step was made")  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError) as refused:
        getattr(trainer(limit_val_batches=1), run)(small, data(tmp_path))
    said = str(refused.value)
    assert "the tokenizer has 264 ids, the model vocab_size=200" in said and "{'vocab_size': 264}" in said
    assert "sequence_length=16 exceeds max_position_embeddings=8" in said
    assert "{'max_position_embeddings': 16}" in said


def test_data_that_just_fit_and_data_that_say_nothing_are_taken(tmp_path: Path) -> None:
    trainer().fit(module(vocab_size=264, max_position_embeddings=16), data(tmp_path))
    trainer().fit(module(max_position_embeddings=8), data(tmp_path).train_dataloader())


def test_a_cosine_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = DeepSeekV3("tiny", SHAPE, learning_rate_schedule="cosine")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"'cosine' needs to know at which step it ends.*max_steps or max_epo"):
        trainer(max_steps=-1, max_epochs=-1, max_time={"minutes": 1}).fit(endless, data(tmp_path))


def test_padding_on_the_left_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    class PaddedOnTheLeft(TextDataModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "attention_mask": torch.arange(16).gt(3).expand_as(batch["input_ids"])}

    source = PaddedOnTheLeft(write_corpus(tmp_path), 16, cache_dir=tmp_path / "cache")
    for command in ("fit", "validate", "test", "predict"):
        with pytest.raises(ConfigurationError, match="tokens after padding"):
            getattr(trainer(limit_val_batches=1), command)(module(), source)


# ---- what it tells --------------------------------------------------------------------------------


def test_utilization_is_logged_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(
        "lightning_dualpipe.callbacks.throughput.flops_utilization",
        lambda flops_per_second, **_: asked.append(flops_per_second) or 0.25,
    )
    run = trainer(callbacks=[Throughput()], log_every_n_steps=1)
    model = module()
    run.fit(model, data(tmp_path))

    assert isinstance(model, CountsFlops)
    assert run.callback_metrics["mfu"] == 0.25
    rate = float(run.callback_metrics["tokens_per_second"])
    assert asked[-1] == pytest.approx(rate * training_flops(model.config, 16), rel=1e-6)


# ---- export ---------------------------------------------------------------------------------------


def written(directory: Path, name: str = "config.json") -> dict[str, Any]:
    settings = json.loads((directory / name).read_text())
    return {key: value for key, value in settings.items() if key.endswith("_token_id")}


def test_an_export_ends_texts_as_the_data_it_was_trained_on_do(tmp_path: Path) -> None:
    run, model = trainer(), module()
    run.fit(model, data(tmp_path))
    model.save_pretrained(tmp_path / "trained")
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DeepSeekV3.load_from_checkpoint(tmp_path / "last.ckpt")
    loaded.save_pretrained(tmp_path / "loaded")
    DeepSeekV3.from_pretrained(tmp_path / "loaded").save_pretrained(tmp_path / "imported")
    for name in ("trained", "loaded", "imported"):
        assert written(tmp_path / name) == written(tmp_path / name, "generation_config.json") == BYTES


def test_token_ids_may_be_given_and_imported_ones_fill_up_what_the_data_do_not_say(tmp_path: Path) -> None:
    class Bytes(ByteTokenizer):
        bos = pad = None  # type: ignore[assignment]

    module().save_pretrained(tmp_path / "given", token_ids={"bos_token_id": 1, "eos_token_id": [2, 3]})
    assert written(tmp_path / "given") == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    imported, source = DeepSeekV3.from_pretrained(tmp_path / "given"), data(tmp_path)
    source._tokenizer = Bytes()
    trainer().fit(imported, source)
    imported.save_pretrained(tmp_path / "filled")
    assert written(tmp_path / "filled") == {"bos_token_id": 1, "eos_token_id": BYTE_EOS, "pad_token_id": None}
    with pytest.raises(ConfigurationError, match="token_ids names eos; the names are bos_token_id, eos_token_id"):
        DeepSeekV3("tiny", token_ids={"eos": 2})


LAYOUTS: dict[str, Any] = {
    "ddp": "ddp",
    "dualpipe": {"pipeline_parallel_size": 2},
    "experts": {"pipeline_parallel_size": 1, "expert_parallel_size": 2},
}


def export(rank: int, layout: str, folder: Path) -> tuple[list[str], str]:
    """Files that are there when this rank returns, and what it raises where they may not be replaced."""
    pretend_torchrun(rank, 2)
    L.seed_everything(7, verbose=False)
    strategy = LAYOUTS[layout]
    run = trainer(devices=2, strategy=DualPipeStrategy(**strategy) if isinstance(strategy, dict) else strategy)
    model = module()
    run.fit(model, data(folder, batch_size=2))
    model.save_pretrained(folder / "model", dtype="float32", max_shard_size=20_000)
    files = sorted(path.name for path in (folder / "model").iterdir())
    model.save_pretrained(folder / "fp8", dtype="float8_block", max_shard_size=20_000)
    try:
        model.save_pretrained(folder / "model")
    except ConfigurationError as error:
        return files, str(error)
    return files, "nothing"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_export_one_model_and_return_when_it_is_there(layout: str, tmp_path: Path) -> None:
    (files, refusal), *others = run_ranks(2, export, layout, tmp_path)
    assert "config.json" in files and sum(name.endswith(".safetensors") for name in files) > 3
    assert others == [(files, refusal)]
    assert "overwrite" in refusal
    again = DeepSeekV3.from_pretrained(tmp_path / "model")
    assert again(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
    assert written(tmp_path / "model") == BYTES
    again.save_pretrained(tmp_path / "one_process", dtype="float8_block")
    in_fp8, expected = stored(tmp_path / "fp8"), stored(tmp_path / "one_process")
    assert in_fp8.keys() == expected.keys() and any(key.endswith("_scale_inv") for key in in_fp8)
    assert all(torch.equal(in_fp8[key].float(), tensor.float()) for key, tensor in expected.items())
    DeepSeekV3.from_pretrained(tmp_path / "fp8").save_pretrained(tmp_path / "round", dtype="float8_block")
    assert all(torch.equal(tensor.float(), expected[key].float()) for key, tensor in stored(tmp_path / "round").items())


def stored(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}
