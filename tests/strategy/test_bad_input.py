"""What cannot run is refused with one clear error: the value that was given, the rule, and what would work.

What can be known before processes start comes from the constructors of strategy and Trainer, or from
``fit`` before it starts them; the rest at setup or at the first batch, on every rank.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision, Precision, TransformerEnginePrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.your_own_model import GPT
from lightning_dualpipe import Batch, DeepSeekV3, DualPipeStrategy, FP8Precision, TensorSpec, TextDataModule
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.layout import ParallelLayout
from lightning_dualpipe.strategy.assembly import check_experts
from tests.ranks import run_ranks
from tests.strategy import program
from tests.strategy.runs import QUIET, SHAPE, pretend_torchrun

STRATEGIES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "unknown schedule": ({"schedule": "zb2"}, "schedule='zb2' is not one of dualpipe, dualpipev, zb1p, 1f1b, gpipe"),
    "unknown dispatcher": (
        {"dispatcher": "deep_ep"},
        "dispatcher='deep_ep' is not one of auto, all_to_all, node, deepep",
    ),
    "no pipeline": (
        {"pipeline_parallel_size": 0},
        "pipeline_parallel_size=0 must be a positive whole number or 'auto'",
    ),
    "negative": ({"expert_parallel_size": -2}, "expert_parallel_size=-2 must be a positive whole number"),
    "a fraction": ({"num_microbatches": 2.5}, "num_microbatches=2.5 must be a positive whole number or 'auto'"),
    "a word": ({"num_microbatches": "many"}, "num_microbatches='many' must be a positive whole number or 'auto'"),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_the_strategy_refuses_arguments_that_no_run_could_have(case):
    arguments, message = STRATEGIES[case]
    with pytest.raises(ConfigurationError, match=f"DualPipeStrategy cannot be built:\n  - {re.escape(message)}$"):
        DualPipeStrategy(**arguments)


TRAINERS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], str]] = {  # strategy's and Trainer's options
    "processes that do not divide": (
        {"pipeline_parallel_size": 4},
        {"devices": 6},
        "pipeline_parallel_size=4 does not divide the 6 processes of this run; use one of 1, 2, 3, 6, or a multiple of "
        "4 processes",
    ),
    "more pipeline ranks than processes": (
        {"pipeline_parallel_size": 4},
        {"devices": 2},
        "pipeline_parallel_size=4 does not divide the 2 processes of this run; use one of 1, 2, or a multiple of "
        "4 processes",
    ),
    "an odd pipeline": (
        {},
        {"devices": 3},
        "dualpipe needs an even number of pipeline ranks, got 3; use schedule='dualpipev', which takes any, or an even "
        "number of processes",
    ),
    "an odd pipeline of six processes": (
        {"pipeline_parallel_size": 3},
        {"devices": 6},
        "dualpipe needs an even number of pipeline ranks, got 3; use schedule='dualpipev', which takes any, or "
        "pipeline_parallel_size=2 or 6",
    ),
    "experts over too few data ranks": (
        {"pipeline_parallel_size": 2, "expert_parallel_size": 4},
        {"devices": 4},
        "expert_parallel_size=4 does not divide the 2 data ranks that experts are spread over (4 processes / "
        "pipeline_parallel_size=2); use one of 1, 2",
    ),
    "DeepEP without a GPU": (
        {"pipeline_parallel_size": 1, "expert_parallel_size": 2, "dispatcher": "deepep"},
        {"devices": 2},
        "dispatcher='deepep' cannot run: DeepEP needs CUDA devices, and this run computes on cpu; dispatcher='auto' "
        "takes what can",
    ),
    "expert groups that lie unevenly on nodes": (
        {"pipeline_parallel_size": 1, "expert_parallel_size": 3, "dispatcher": "node"},
        {"devices": 2, "num_nodes": 3},
        "dispatcher='node' cannot run: expert_parallel_size=3 ranks do not lie evenly on nodes of 2; use a divisor or "
        "a multiple of that; dispatcher='auto' takes what can",
    ),
    "sync_batchnorm": (
        {},
        {"devices": 2, "sync_batchnorm": True},
        "sync_batchnorm=True has no meaning here: microbatches of one batch never meet in a layer; remove it",
    ),
    "float16": (
        {},
        {"devices": 2, "precision": "16-true"},
        "precision='16-true' would let ranks skip different steps, and sums of losses overflow float16; "
        "use precision='bf16-mixed' or 'bf16-true'",
    ),
    "float16 in part": (
        {},
        # on CPU Lightning would take bf16-mixed instead, with a warning
        {"devices": 2, "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
        "precision='16-mixed' would let ranks skip different steps, and sums of losses overflow float16; "
        "use precision='bf16-mixed' or 'bf16-true'",
    ),
}


FP8: Mapping[str, tuple[Mapping[str, Any], Precision, str]] = {
    "delayed scales in a pipeline": (
        {"schedule": "1f1b"},
        FP8Precision("delayed"),
        "strategy '1f1b' cannot run:\n  - recipe='delayed' scales by the largest values of earlier microbatches, which "
        "the 2 stages of this pipeline see in different orders, so that results would depend on the layout; use "
        "recipe='block', or 'current', whose scales come from the tensors themselves",
    ),
    "delayed scales in a V of two stages on each rank": (
        {"pipeline_parallel_size": 1, "expert_parallel_size": 2},
        FP8Precision({"name": "delayed", "history": 16}),
        "strategy 'dualpipe' cannot run:\n  - recipe='delayed' scales by the largest values of earlier microbatches, "
        "which the 2 stages",
    ),
    "delayed scales without Transformer Engine": (
        {"pipeline_parallel_size": 1},
        FP8Precision("delayed"),
        "recipe 'delayed' cannot run on cpu: scales of 'delayed' come from earlier steps, which only",
    ),
    "kernels without a GPU": (
        {},
        FP8Precision(backend="te"),
        "backend='te' cannot run: Transformer Engine needs CUDA devices, and this run computes on cpu; use "
        "backend='emulate'",
    ),
    "Lightning's own FP8": (
        {},
        TransformerEnginePrecision.__new__(TransformerEnginePrecision),
        "strategy 'dualpipe' cannot run:\n  - precision='transformer-engine' is Lightning's own, which scales by the "
        "largest values of earlier steps; ranks that hold different layers cannot agree on those. Leave precision out, "
        "and give the Trainer plugins=[lightning_dualpipe.FP8Precision()]",
    ),
}


@pytest.mark.parametrize("case", FP8)
def test_the_trainer_refuses_fp8_that_cannot_be_before_any_process_is_started(case):
    strategy, plugin, message = FP8[case]
    with pytest.raises(ConfigurationError) as refused:
        L.Trainer(strategy=DualPipeStrategy(**strategy), accelerator="cpu", devices=2, plugins=[plugin], **QUIET)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("case", TRAINERS)
def test_the_trainer_refuses_before_any_process_is_started(case):
    strategy, options, message = TRAINERS[case]
    with pytest.raises(ConfigurationError, match=rf"strategy '\w+' cannot run:\n  - {re.escape(message)}$"):
        L.Trainer(strategy=DualPipeStrategy(**strategy), accelerator="cpu", **QUIET, **options)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigurationError) as refused:
        L.Trainer(strategy="dualpipe", accelerator="cpu", devices=3, precision="16-true", sync_batchnorm=True, **QUIET)
    assert [line for line in str(refused.value).splitlines() if line.startswith("  - ")].__len__() == 3


def test_devices_that_are_not_those_of_the_launcher_are_refused(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "tests"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"devices=2.*does not match the world size \(4\)"):  # Lightning's own
        L.Trainer(strategy="dualpipe", accelerator="cpu", devices=2, **QUIET)


def test_apple_devices_are_refused():
    strategy = DualPipeStrategy(parallel_devices=[torch.device("mps", 0)])  # what accelerator="mps" sets on a Mac
    with pytest.raises(ConfigurationError, match=r"MPS devices .* no float64.*; use accelerator='cpu' or CUDA devices"):
        L.Trainer(strategy=strategy, accelerator="cpu", devices=1, **QUIET)


def test_an_unknown_option_in_yaml_is_named(tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text("strategy: {class_path: lightning_dualpipe.DualPipeStrategy, init_args: {num_microbatchs: 8}}\n")
    with pytest.raises(SystemExit):
        LightningCLI(program.LanguageModel, run=False, args=["--trainer", str(config)])
    said = capsys.readouterr().err
    assert "num_microbatchs" in said and "DualPipeStrategy" in said


# ---- the model ------------------------------------------------------------------------------------


class Plain(L.LightningModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or nn.Linear(2, 2)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoModels(Plain):
    def __init__(self) -> None:
        super().__init__(gpt())
        self.teacher = gpt()


class WithAHeadOfItsOwn(Plain):
    def __init__(self) -> None:
        super().__init__(gpt())
        self.critic = nn.Linear(8, 1)


class BuiltLater(Plain):
    def configure_model(self) -> None:
        self.model = nn.Linear(3, 3)


def gpt(depth: int = 2) -> GPT:
    return GPT(11, 8, depth, 2)


MODELS: Mapping[str, tuple[Callable[[], L.LightningModule], Mapping[str, Any], str]] = {
    "without the protocol": (
        Plain,
        {},
        r"Plain has no model that a pipeline can cut: .*layers\(\), inputs\(\), boundary\(\) and loss\(\).*your_own",
    ),
    "two models": (TwoModels, {}, r"TwoModels has 2 models that a pipeline could cut \(model, teacher\); .*keep one"),
    "parameters outside the pipelined model": (
        WithAHeadOfItsOwn,
        {"pipeline_parallel_size": 2},
        r"2 parameters belong to no layer \(critic.weight, critic.bias\): list their module in WithAHeadOfItsOwn",
    ),
    "more stages than layers": (
        lambda: Plain(gpt()),
        {"pipeline_parallel_size": 6},
        r"6 stages need at least 6 layers to share out, the model has 4 .*use fewer pipeline ranks or a deeper model",
    ),
    "experts that do not divide": (
        lambda: DeepSeekV3("tiny", {**SHAPE, "n_routed_experts": 4}),
        {"pipeline_parallel_size": 2, "expert_parallel_size": 3},
        r"expert_parallel_size=3 does not divide the model's 4 routed experts; use one of 1, 2, 4",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_fit_refuses_a_model_before_it_starts_processes(case, monkeypatch):
    make, strategy, message = MODELS[case]
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process is started"))
    trainer = L.Trainer(strategy=DualPipeStrategy(**strategy), accelerator="cpu", devices=6, **QUIET)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(make(), loader())


LAYERS: Mapping[str, tuple[Callable[[], L.LightningModule], Mapping[str, Any], str]] = {
    "sizes that kernels do not take": (
        lambda: Plain(gpt()),
        {},
        r"Plain cannot be trained in FP8:\n  - no layer is left .*sizes that are no multiples of 16: \d+; taken for",
    ),
    "sizes that were asked for": (
        lambda: DeepSeekV3("tiny", {**SHAPE, "kv_lora_rank": 24}),
        {"include": ["*.kv_b_proj"]},
        r"model.blocks.*.self_attn.kv_b_proj: included, but with a weight of 32 x 24: kernels take multiples of 16;",
    ),
    "a name that fits no layer": (
        lambda: DeepSeekV3("tiny", SHAPE),
        {"exclude": ["model.blocks.9.*"]},
        r"exclude='model.blocks.9.\*' fits none of its \d+ layers that multiply; did you mean 'model.blocks",
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_fit_refuses_layers_that_cannot_multiply_in_fp8_before_it_starts_processes(case, monkeypatch):
    make, options, message = LAYERS[case]
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process is started"))
    strategy = DualPipeStrategy(pipeline_parallel_size=2)
    with pytest.raises(ConfigurationError, match=message):
        trainer(strategy, devices=2, plugins=[FP8Precision(**options)]).fit(make(), loader())


AVERAGES = {
    StochasticWeightAveraging: {"swa_lrs": 0.1, "swa_epoch_start": 1},
    WeightAveraging: {},
    EMAWeightAveraging: {"decay": 0.9},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_a_model_that_is_copied_before_it_is_cut_is_refused(kind, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process is started"))
    message = f"{kind.__name__} copies .* for pipeline_parallel_size=2 and expert_parallel_size=1, .*; remove the"
    with pytest.raises(ConfigurationError, match=message):
        trainer(DualPipeStrategy(), devices=2, callbacks=[kind(**AVERAGES[kind])]).fit(Plain(gpt()), loader())


def test_one_process_may_average_what_it_holds():
    callbacks = [StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)]
    alone = trainer(DualPipeStrategy(), max_steps=-1, max_epochs=2, limit_train_batches=2, callbacks=callbacks)
    alone.fit(Plain(gpt()), loader())


def test_an_expert_size_for_a_model_without_experts_is_warned_of():
    with pytest.warns(UserWarning, match="expert_parallel_size=2 has no effect: Plain has no experts to spread"):
        check_experts(Plain(gpt()), ParallelLayout(2, expert=2))


def test_a_model_that_is_built_later_is_refused_at_setup():
    with pytest.raises(ConfigurationError, match="BuiltLater has no model that a pipeline can cut"):
        trainer(DualPipeStrategy()).fit(BuiltLater(), loader())


class Misdeclared(GPT):
    def boundary(self, batch: Batch) -> list[TensorSpec]:
        return [TensorSpec((*batch["input_ids"].shape, self.width + 1))]


class Silent(GPT):
    def boundary(self, batch: Batch) -> list[TensorSpec]:
        return []


BOUNDARIES = {
    Misdeclared: "declares float32 [1, 8, 9], but layer '0 (Embedding)' returns float32 [1, 8, 8]",
    Silent: "declares nothing, but layer '0 (Embedding)' returns float32 [1, 8, 8]",
}


@pytest.mark.parametrize("model", BOUNDARIES)
def test_a_boundary_that_declares_other_shapes_than_pass_it_is_named(model):
    message = f"ConfigurationError: {model.__name__}.boundary(batch) {BOUNDARIES[model]}; declare what crosses"
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_ranks(2, fit_on_two_ranks, model, timeout=60)


def fit_on_two_ranks(rank: int, model: type[GPT]) -> None:
    pretend_torchrun(rank, 2)
    trainer(DualPipeStrategy(), devices=2).fit(Plain(model(11, 8, 2, 2)), loader())


# ---- data -----------------------------------------------------------------------------------------


def loader() -> DataLoader[Any]:
    return DataLoader(program.Tokens(), batch_size=program.BATCH_SIZE)


def trainer(strategy: DualPipeStrategy, **options: Any) -> L.Trainer:
    return L.Trainer(strategy=strategy, accelerator="cpu", **{"devices": 1, "max_steps": 2, **QUIET, **options})


def test_a_batch_that_does_not_divide_into_microbatches_is_refused():
    message = (
        r"a batch of 4 samples does not split into num_microbatches=3 equal parts; use a batch size that is a multiple "
        r"of 3, or num_microbatches='auto'"
    )
    with pytest.raises(ConfigurationError, match=message):
        trainer(DualPipeStrategy(num_microbatches=3)).fit(Plain(gpt()), loader())


# ---- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Any]:
    first = trainer(DualPipeStrategy())
    first.fit(program.LanguageModel(width=8, depth=2, heads=2), loader())
    path = tmp_path_factory.mktemp("bad") / "saved.ckpt"
    first.save_checkpoint(path)
    return torch.load(path, weights_only=False)


def renamed(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    state["model.foot.0.weight"] = state.pop("model.head.0.weight")


def misshapen(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    state["model.head.0.weight"] = torch.zeros(9)


def regrouped(checkpoint: dict[str, Any]) -> None:
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    checkpoint["optimizer_states"][0]["param_groups"] = [
        {**group, "params": group["params"][:3]},
        {**group, "params": group["params"][3:]},
    ]


CHECKPOINTS: Mapping[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "names": (
        renamed,
        [
            "the checkpoint belongs to another model; build the model with the configuration it was saved with",
            "1 tensors of this model are missing in it: model.head.0.weight",
            "1 tensors in it are unknown to this model: model.foot.0.weight",
        ],
    ),
    "shapes": (misshapen, ["1 tensors have another shape: model.head.0.weight is (9,), here (8,)"]),
    "an optimizer with other groups": (
        regrouped,
        ["the checkpoint's optimizer has parameter groups of [3, 27] parameters, this one of [30]", "resume with the"],
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_of_another_model_is_refused_with_the_tensors_named(case, saved, tmp_path):
    change, messages = CHECKPOINTS[case]
    checkpoint = {
        **saved,
        "state_dict": dict(saved["state_dict"]),
        "optimizer_states": [dict(saved["optimizer_states"][0])],
    }
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigurationError) as refused:
        trainer(DualPipeStrategy(), max_steps=4).fit(
            program.LanguageModel(width=8, depth=2, heads=2), loader(), ckpt_path=tmp_path / "foreign.ckpt"
        )
    for message in messages:
        assert message in str(refused.value)


# ---- the model's own configuration ----------------------------------------------------------------


def test_an_unknown_override_is_named_with_the_nearest_field():
    with pytest.raises(ConfigurationError, match=r"num_hiden_layers.*num_hidden_layers"):
        DeepSeekV3("tiny", {"num_hiden_layers": 3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(ConfigurationError, match=r"preset='tinny' is not one of tiny, small, 16b, 671b.*tiny"):
        DeepSeekV3("tinny")  # type: ignore[arg-type]


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="no-such-file"):
        TextDataModule(str(tmp_path / "no-such-file.txt")).prepare_data()
