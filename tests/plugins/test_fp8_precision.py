"""``FP8Precision`` in a Trainer: what it converts and gives back, and that a run in FP8 is an ordinary run."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.your_own_model import LanguageModel
from lightning_dualpipe import Batch, DeepSeekV3, DualPipeStrategy, FP8Precision
from lightning_dualpipe.deepseek_v3.moe import MoE
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.plugins import fp8_precision
from lightning_dualpipe.precision import backends, reference
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.fp8_weight import QuantisedWeight
from lightning_dualpipe.precision.recipe import Block, Current
from tests.ranks import run_ranks
from tests.strategy.runs import QUIET, SHAPE, pretend_torchrun

HEAD = "model.head.1"


class Model(LanguageModel):
    def __init__(self, *, fused: bool = True) -> None:
        super().__init__(vocab_size=16, width=32, depth=2, heads=2)
        self.fused, self.seen = fused, []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)


class ByHand(Model):
    """Steps with torch's own optimizer, past every hook of Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()


class Watch(L.Callback):
    """How many layers multiply in FP8, at each kind of step."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.counts["fit"] = converted(module)

    def on_validation_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.counts[str(trainer.state.fn)] = converted(module)


def converted(module: nn.Module) -> int:
    return sum("matmul" in vars(layer) for layer in module.modules())


def data(count: int = 8) -> DataLoader[Batch]:
    """``count`` batches of four sequences of 16 tokens.

    64 tokens: ``auto`` divides by their number before the backward, a pipeline after it; where that is no power of two,
    gradients are rounded differently.
    """
    tokens = torch.randint(16, (4 * count, 17), generator=torch.Generator().manual_seed(0))
    tokens[:, 1::2] = tokens[:, :-1:2]  # every second token repeats the one before
    return DataLoader([{"input_ids": each[:-1], "labels": each[1:]} for each in tokens], batch_size=4)  # type: ignore


def trainer(
    *, strategy: Any = "auto", steps: int = 6, fp8: Mapping[str, Any] | None = None, **options: Any
) -> L.Trainer:
    plugins = [FP8Precision(**(fp8 or {}))]
    options = {"devices": 1, "max_steps": steps, **QUIET, **options}
    return L.Trainer(accelerator="cpu", strategy=strategy, plugins=plugins, **options)


def losses(module: Model, **options: Any) -> list[float]:
    L.seed_everything(3, verbose=False)
    trainer(**options).fit(module, data())
    return module.seen


def fresh(kind: type[Model] = Model, **options: Any) -> Model:
    L.seed_everything(3, verbose=False)
    return kind(**options)


# ---- what it converts and gives back --------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "dualpipe"])
def test_layers_multiply_in_fp8_during_a_run_and_as_before_after_it(strategy):
    module, watch = fresh(), Watch()
    kinds, keys = [type(each) for each in module.modules()], list(module.state_dict())
    for _ in range(2):
        run = trainer(strategy=strategy, callbacks=[watch], limit_val_batches=1)
        run.fit(module, data(), data(1))
        run.validate(module, data(1), verbose=False)
        # blocks of qkv, out, up and down; the head is taken for sensitive
        assert watch.counts == {"fit": 8, "TrainerFn.FITTING": 8, "TrainerFn.VALIDATING": 8}
        assert not any({"forward", "matmul"} & vars(each).keys() for each in module.modules())
        watch.counts.clear()
    assert [type(each) for each in module.modules()] == kinds and list(module.state_dict()) == keys
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.seen[-1] < module.seen[0] - 0.3


def test_the_loss_is_that_of_products_by_the_definition():
    module = fresh()
    batch, recipe = next(iter(data(1))), Current()
    first = losses(module, steps=1, fp8={"recipe": "current", "weights": "64-true"})[0]

    expected = fresh().double()
    for name, layer in expected.named_modules():
        if isinstance(layer, nn.Linear) and name != HEAD:
            layer.forward = lambda x, layer=layer: (
                reference.forward(x.flatten(0, -2), layer.weight, recipe).view(*x.shape[:-1], -1) + layer.bias
            )
    assert float(expected.model(batch)["loss"]) == pytest.approx(first, rel=1e-12)
    assert float(fresh().double().model(batch)["loss"]) != pytest.approx(first, rel=1e-6)


def test_the_end_of_a_failed_run_gives_layers_back_too():
    class Fails(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            raise RuntimeError(f"with {converted(self)} layers")

    module = fresh(Fails)
    with pytest.raises(RuntimeError, match="with 8 layers"):
        losses(module)
    assert converted(module) == 0


PRECISIONS = {
    "bf16-true": torch.bfloat16,
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
}


@pytest.mark.parametrize("strategy", ["auto", "dualpipe"])
@pytest.mark.parametrize("weights", PRECISIONS)
def test_everything_else_is_in_the_precision_asked_for(weights, strategy):
    module = fresh(fused=False)
    options = {"recipe": "bf16", "weights": weights}
    clipped = {"strategy": strategy, "gradient_clip_val": 0.5}
    plain = losses(module, fp8=options, **clipped)
    assert {parameter.dtype for parameter in module.parameters()} == {PRECISIONS[weights]}
    again = fresh(fused=False)  # without our plugin
    L.Trainer(accelerator="cpu", devices=1, max_steps=6, precision=weights, **QUIET, **clipped).fit(again, data())
    assert again.seen == plain

    in_fp8 = losses(fresh(fused=False), fp8={"weights": weights}, **clipped)
    assert in_fp8 != plain and in_fp8 == pytest.approx(plain, rel=0.05)


# ---- weights that change --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "dualpipe"])
@pytest.mark.parametrize("kind", [Model, ByHand])
def test_no_step_sees_the_weights_of_the_step_before(kind, strategy, monkeypatch):
    """torch's fused AdamW writes without counting; with microbatches, so that something is kept to begin with."""
    strategies = {"auto": "auto", "dualpipe": DualPipeStrategy(num_microbatches=2)}
    options: dict[str, Any] = {"strategy": strategies[strategy], "fp8": {"weights": "64-true"}}
    options |= {"steps": -1, "max_epochs": 1, "limit_train_batches": 6}  # Lightning does not count steps by hand
    kept = losses(fresh(kind), **options)

    usual = QuantisedWeight._get

    def forgetful(self: QuantisedWeight, *arguments: Any) -> Any:
        self._kept = {}
        return usual(self, *arguments)

    monkeypatch.setattr(QuantisedWeight, "_get", forgetful)
    strategies["dualpipe"] = DualPipeStrategy(num_microbatches=2)
    assert losses(fresh(kind), **{**options, "strategy": strategies[strategy]}) == kept
    assert len(kept) == 6 and kept[-1] < kept[0] - 0.1


def test_training_does_not_see_the_weights_of_an_evaluation(monkeypatch):
    """Lightning's average takes the weights' places for an evaluation, through ``.data``, which nothing counts."""

    def trained() -> list[float]:
        module, average = fresh(), EMAWeightAveraging(decay=0.5)
        L.seed_everything(3, verbose=False)
        options = {**QUIET, "limit_val_batches": 1, "val_check_interval": 2}
        plugins = [FP8Precision(weights="32-true")]
        run = L.Trainer(accelerator="cpu", devices=1, max_steps=6, plugins=plugins, callbacks=[average], **options)
        run.fit(module, data(), data(1))
        return module.seen

    kept, usual = trained(), QuantisedWeight._get

    def forgetful(self: QuantisedWeight, *arguments: Any) -> Any:
        self._kept = {}
        return usual(self, *arguments)

    monkeypatch.setattr(QuantisedWeight, "_get", forgetful)
    assert trained() == kept


@pytest.mark.parametrize("strategy", ["auto", "dualpipe"])
def test_a_forward_runs_in_the_context_of_the_backend(strategy, monkeypatch):
    """Once: it is where a recipe that remembers learns."""
    entered = []

    @contextmanager
    def context(backend: EmulateBackend) -> Iterator[None]:
        entered.append(backend)
        yield

    monkeypatch.setattr(EmulateBackend, "context", context)
    losses(fresh(), strategy=DualPipeStrategy(num_microbatches=1) if strategy == "dualpipe" else strategy, steps=3)
    assert len(entered) == 3 and len(set(map(id, entered))) == 1


# ---- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["auto", "dualpipe"])
def test_a_run_goes_on_where_its_checkpoint_stood(second, tmp_path):
    path, options = tmp_path / "fp8.ckpt", {"fp8": {"weights": "64-true"}}
    trainer(steps=6, **options).fit(whole := fresh(), data(3))
    run = trainer(steps=3, **options)
    run.fit(first := fresh(), data())
    run.save_checkpoint(path)

    strategy = "auto" if second == "auto" else DualPipeStrategy(num_microbatches=1)
    trainer(strategy=strategy, steps=6, **options).fit(resumed := Model().double(), data(), ckpt_path=path)
    assert [*first.seen, *resumed.seen] == pytest.approx(whole.seen, rel=1e-10) and len(resumed.seen) == 3


@pytest.mark.parametrize("precision", ["fp8 to bf16", "bf16 to fp8", "block to current"])
def test_checkpoints_do_not_say_how_they_were_trained(precision, tmp_path):
    path = tmp_path / "any.ckpt"
    fp8, plain, other = ({"recipe": recipe} for recipe in ("block", "bf16", "current"))
    one, two = {"fp8 to bf16": (fp8, plain), "bf16 to fp8": (plain, fp8), "block to current": (fp8, other)}[precision]
    run = trainer(steps=2, fp8=one)
    run.fit(first := fresh(), data())
    run.save_checkpoint(path)
    assert "FP8Precision" not in torch.load(path, weights_only=False)

    loaded = Model()
    loaded.load_state_dict(torch.load(path)["state_dict"])
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.bfloat16(), first.state_dict()[name])
    run = trainer(steps=4, fp8=two)
    run.fit(second := Model(), data(), ckpt_path=path)
    assert len(second.seen) == 2 and second.seen[-1] < first.seen[0]


# ---- other ranks ----------------------------------------------------------------------------------


def _in_two_processes(rank: int, strategy: str) -> tuple[list[float], Tensor, dict[str, int]]:
    pretend_torchrun(rank, 2)
    module, watch = fresh(), Watch()
    options = {"devices": 2, "callbacks": [watch], "limit_val_batches": 1}
    run = trainer(strategy=strategy, steps=4, fp8={"weights": "64-true"}, **options)
    run.fit(module, data())
    run.validate(module, data(2), verbose=False)
    assert converted(module) == 0
    return (
        module.seen,
        module.model.blocks[0].qkv.weight.detach() if strategy == "ddp" else torch.zeros(1),
        watch.counts,
    )


@pytest.mark.parametrize("strategy", ["ddp", "dualpipe"])
def test_two_processes(strategy):
    first, second = run_ranks(2, _in_two_processes, strategy)
    assert torch.equal(first[1], second[1])
    counts = [each[2] for each in (first, second)]
    assert all(each["fit"] == each["TrainerFn.VALIDATING"] > 0 for each in counts)
    if strategy == "dualpipe":  # both directions: every rank holds both ends
        assert first[0] == second[0]
        assert first[0][0] == pytest.approx(losses(fresh(), steps=1, fp8={"weights": "64-true"})[0], rel=1e-3)


# ---- what it says and refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "travel_in_fp8"),
    [
        ({}, True),
        ({"dispatch": "fp8"}, True),
        ({"dispatch": "bf16"}, False),
        ({"recipe": "mxfp8"}, True),
        ({"recipe": {"name": "block", "scales": "float32"}}, False),
        ({"recipe": "current"}, False),
        ({"exclude": ["*.experts"]}, False),
    ],
)
def test_tokens_travel_in_fp8_where_experts_multiply_in_it_and_nothing_is_lost(arguments, travel_in_fp8):
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 32}
    module = DeepSeekV3("tiny", {**SHAPE, "moe_intermediate_size": 32, "intermediate_size": 64, **sizes})
    mixtures = [each for each in module.modules() if isinstance(each, MoE)]
    plugin = FP8Precision(**{"backend": "emulate", **arguments})
    module.configure_model()
    plugin.convert_module(module)
    assert mixtures and [each.token_format is not None for each in mixtures] == [travel_in_fp8] * len(mixtures)
    assert all(each.dispatcher.row_format == each.token_format for each in mixtures)
    plugin.teardown()
    assert all(each.token_format is None and each.dispatcher.row_format is None for each in mixtures)


def test_it_says_once_what_it_converted_by_whom_and_why(caplog):
    run = trainer(steps=1)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run.fit(module := fresh(), data())
        run.validate(module, data(1), verbose=False)
    said = [record.getMessage() for record in caplog.records if "FP8" in record.getMessage()]
    assert said == [
        "FP8 by Block(scales='power_of_two'), backend='emulate': no kernels multiply FP8 on cpu. It multiplies 8 "
        "linear layers (model.blocks.*.{qkv,out,up,down}); not model.head.* (taken for the output head)"
    ]


def test_layers_that_no_kernel_takes_are_warned_of_but_not_those_that_are_excluded(recwarn):
    """Of a mixture of experts it may be nearly all of the work."""
    odd = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    odd["moe_intermediate_size"] = 24
    with pytest.warns(UserWarning, match=r"^4 layers multiply in bf16-true, .* \(128 x 24\), .* \(24 x 128\); choose"):
        FP8Precision().convert_module(DeepSeekV3("tiny", odd))
    recwarn.clear()
    FP8Precision(exclude=["*.experts", "*.shared_experts.*"]).convert_module(DeepSeekV3("tiny", odd))
    assert not recwarn.list


def test_whoever_writes_past_the_counter_says_so_and_may_do_it_without_fp8():
    plugin, module = FP8Precision(weights="32-true"), fresh()
    plugin.convert_module(module)
    layer, x = module.model.blocks[0].qkv, torch.randn(3, 32)
    layer(x)
    layer.weight.data.mul_(3.1)
    plugin.weights_changed()
    assert torch.equal(layer(x), reference.forward(x, layer.weight.detach(), Block()) + layer.bias)
    FP8Precision("bf16").weights_changed()


def test_a_plugin_that_was_in_a_pipeline_clips_elsewhere_as_ever():
    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            trainer.strategy.precision_plugin.clip_gradients(optimizer, 1e-3)
            self.last = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])

    plugin, norms = FP8Precision(weights="32-true"), Norms()
    for strategy in (DualPipeStrategy(), "auto"):
        run = L.Trainer(
            accelerator="cpu", devices=1, strategy=strategy, plugins=[plugin], max_steps=1, callbacks=[norms], **QUIET
        )
        run.fit(fresh(), data())
        assert 0.9e-3 < norms.last < 1.1e-3


def test_a_gpu_without_fp8_is_warned_of_and_computes_without(monkeypatch):
    monkeypatch.setattr(fp8_precision, "_device_of", lambda module: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    plugin = FP8Precision()
    message = r"nothing multiplies in FP8, but all in bf16-true: recipe 'block' needs Hopper .*A100-SXM4-80GB \(SM80\)"
    with pytest.warns(UserWarning, match=message):
        module = plugin.convert_module(fresh())
    assert plugin.backend is None and converted(module) == 0
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigurationError, match=r"backend='te' cannot run: recipe 'block' needs Hopper"):
        FP8Precision(backend="te").convert_module(fresh())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="Transformer Engine needs CUDA devices, and this run computes on cpu"):
        losses(fresh(), fp8={"backend": "te"})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown recipe": (
        {"recipe": "blok"},
        "recipe 'blok' is not one of block, current, delayed, mxfp8, bf16; did you",
    ),
    "an unknown key": ({"recipe": {"name": "block", "scale": 1}}, "recipe 'block' has no setting 'scale'"),
    "an unknown backend": ({"backend": "cuda"}, "backend='cuda' is not one of auto, te, torch, emulate"),
    "an unknown precision": (
        {"weights": "16-true"},
        "weights='16-true' is not one of bf16-true, 32-true, 64-true, bf16-m",
    ),
    "an unknown way to experts": ({"dispatch": "fp16"}, "dispatch='fp16' is not one of auto, fp8, bf16"),
    "tokens that would lose something": (
        {"recipe": "current", "dispatch": "fp8"},
        "dispatch='fp8' with Current(gradient_format='e5m2') would round tokens once more on their way; use recipe='bl",
    ),
    "a recipe without a name": (
        {"recipe": {"scales": "float32"}},
        "recipe {'scales': 'float32'} has no name; write {'n",
    ),
    "a number for a list": ({"exclude": 1}, "exclude=1 must be a list of names"),
    "no FP8 to send": ({"recipe": "bf16", "dispatch": "fp8"}, "dispatch='fp8' with recipe 'bf16', which has no FP8"),
    "a word for a list": ({"include": "*.o_proj"}, "include='*.o_proj' must be a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_no_run_could_have_are_refused(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as refused:
        FP8Precision(**arguments)
    assert str(refused.value).startswith(f"FP8Precision cannot be built:\n  - {message}")


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigurationError) as refused:
        FP8Precision("blok", backend="cuda", weights="8", include="a")  # type: ignore[arg-type]
    assert str(refused.value).count("\n  - ") == 4


def test_two_precisions_are_one_too_many():
    with pytest.raises(
        ValueError, match=r"precision=bf16-true` and `plugins=FP8Precision\(recipe=Block\(.*weights='bf16"
    ):
        trainer(precision="bf16-true")
    with pytest.raises(L.fabric.utilities.exceptions.MisconfigurationException, match="multiple values for Precision"):
        L.Trainer(accelerator="cpu", plugins=[FP8Precision(), MixedPrecision("bf16-mixed", "cpu")], **QUIET)


# ---- YAML -----------------------------------------------------------------------------------------

RECIPES = {
    "by name": ("current", Current()),
    "by name and settings": ({"name": "block", "scales": "float32"}, Block("float32")),
    "default": (None, Block()),
}


@pytest.mark.parametrize("form", ["one", "a list"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_yaml(recipe, form, monkeypatch):
    given, expected = RECIPES[recipe]
    options = {"weights": "32-true", "exclude": ["*.qkv"], **({} if given is None else {"recipe": given})}
    plugin = {"class_path": "lightning_dualpipe.FP8Precision", "init_args": options}
    config = {"accelerator": "cpu", "devices": 1, "plugins": plugin if form == "one" else [plugin]}
    Path("trainer.yaml").write_text(yaml.safe_dump({"trainer": config}))
    monkeypatch.setattr("sys.argv", ["fit"])
    built = LightningCLI(Model, run=False, args=["--config", "trainer.yaml"], save_config_callback=None).trainer
    plugin = built.precision_plugin
    assert isinstance(plugin, FP8Precision) and plugin.recipe == expected and plugin.precision == "32-true"
    module = plugin.convert_module(fresh())
    assert converted(module) == 6
    plugin.teardown()


@pytest.mark.parametrize("wrong", [{"recipe": "blok"}, {"recipes": "block"}, {"weights": "16-true"}])
def test_a_mistake_in_yaml_is_named(wrong, monkeypatch, capsys):
    plugin = {"class_path": "lightning_dualpipe.FP8Precision", "init_args": wrong}
    Path("trainer.yaml").write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", "plugins": [plugin]}}))
    monkeypatch.setattr("sys.argv", ["fit"])
    with pytest.raises((SystemExit, ValueError)) as refused:
        LightningCLI(Model, run=False, args=["--config", "trainer.yaml"], save_config_callback=None)
    ((key, value),) = wrong.items()
    said = capsys.readouterr().err + str(refused.value)
    assert key in said and value in said and "FP8Precision" in said
