import pytest
import torch
from torch import nn

from examples.your_own_model import LanguageModel
from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.precision.selection import select
from tests.precision.test_linear import Scaled


def deepseek(**overrides):
    return DeepSeekV3("tiny", {"num_hidden_layers": 3, "num_nextn_predict_layers": 1, **overrides})


def test_of_deepseek_v3_all_projections_and_experts_but_not_head_router_and_eh_proj():
    """As the report has it (section 3.3.1), and as the released weights are."""
    module = deepseek()
    selection = select(module)
    kinds = {name.rpartition(".")[2] for name in selection.linears}
    assert kinds >= {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "down_proj"}
    assert selection.kept == dict.fromkeys(["model.lm_head", "model.mtp.0.eh_proj"], "sensitive, as the model says")
    assert set(selection.experts) == {
        "model.blocks.1.mlp.experts",
        "model.blocks.2.mlp.experts",
        "model.mtp.0.block.mlp.experts",
    }
    linears = {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    assert set(selection.linears) == linears - selection.kept.keys()
    assert not any("gate." in name or name.endswith(".gate") for name in selection.names)


@pytest.mark.parametrize("preset", ["tiny", "small", "16b", "671b"])
def test_sizes_of_all_presets_are_fit_for_fp8(preset):
    selection = select(DeepSeekV3(preset))
    assert set(selection.kept.values()) == {"sensitive, as the model says"}


def test_of_another_model_the_last_layer_is_taken_for_the_head():
    selection = select(LanguageModel(width=32, depth=2, heads=2))
    assert selection.kept == {"model.head.1": "taken for the output head"}
    assert set(selection.linears) == {
        f"model.blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "out", "up", "down")
    }
    assert selection.experts == ()


def test_a_layer_that_shares_the_weight_of_an_embedding_is_a_head_wherever_it_stands():
    embedding, head = nn.Embedding(48, 32), nn.Linear(32, 48)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head, "a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    assert select(model).linears == ("a",)


def test_sizes_that_kernels_do_not_take_stay_and_are_told():
    model = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 16))
    selection = select(model)
    assert selection.linears == ("2", "3")
    assert selection.kept["0"] == selection.kept["1"] == "sizes that are no multiples of 16"
    assert selection.odd_sizes == "0 (24 x 32), 1 (32 x 24)"
    assert select(model, multiple=8).linears == ("0", "1", "2", "3")


def test_patterns_choose():
    module = deepseek()
    everything = select(module)
    attention = select(module, include=["*.self_attn.*"])
    assert set(attention.names) == {name for name in everything.names if ".self_attn." in name}
    assert not attention.experts
    without = select(module, exclude=["model.blocks.0.*", "*.experts"])
    assert set(without.names) == {n for n in everything.names if ".blocks.0." not in n and not n.endswith(".experts")}
    assert without.kept["model.blocks.1.mlp.experts"] == "excluded"
    assert "model.lm_head" in without.kept
    both = select(module, include=["*_proj"], exclude=["*.blocks.1.*"])
    assert "model.mtp.0.eh_proj" in both.names and not any(".blocks.1." in name for name in both.names)


def test_what_is_included_is_converted_sensitive_or_not():
    assert select(deepseek(vocab_size=272), include=["model.lm_head"]).linears == ("model.lm_head",)


def test_it_says_what_it_chose_in_a_line():
    assert str(select(LanguageModel(width=32, depth=2, heads=2))) == (
        "8 linear layers (model.blocks.*.{qkv,out,up,down}); not model.head.* (taken for the output head)"
    )
    text = str(select(deepseek(), include=["*.experts", "*.o_proj"], exclude=["*.blocks.*"]))
    assert text.startswith(
        "1 linear layer and 1 stack of experts (model.mtp.*.block.self_attn.o_proj, model.mtp.*.block"
    )


def test_of_layers_that_are_chosen_in_part_it_says_the_numbers():
    """That the first block is not among them must be seen."""
    module = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 32)}) for _ in range(7))})
    module["head"] = nn.Linear(32, 16)
    text = str(select(module, exclude=["blocks.0.*", "blocks.4.*"]))
    assert text == (
        "5 linear layers (blocks.{1-3,5-6}.up); not blocks.{0,4}.up (excluded), head (taken for the output head)"
    )
    assert "(blocks.5.up); not" in str(select(module, include=["blocks.5.*"]))


class Heads(nn.Module):
    in_high_precision = ("heads",)

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 16)])
        self.body = nn.Linear(32, 32)
        self.heads_of_state = nn.Linear(32, 32)


def test_a_model_names_what_stays_and_what_is_beneath_it():
    selection = select(nn.ModuleDict({"model": Heads()}))
    assert selection.linears == ("model.body", "model.heads_of_state")


def test_meta_tensors_do():
    with torch.device("meta"):
        assert select(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))).linears == ("0",)


REFUSED = {
    "a pattern of include that fits nothing": (
        lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)),
        {"include": ["model.*"]},
        ["include='model.*' fits none of its 2 layers that multiply: *"],
    ),
    "a layer that does not multiply": (
        lambda: nn.ModuleDict({"norm": nn.LayerNorm(32), "up": nn.Linear(32, 32), "head": nn.Linear(32, 32)}),
        {"include": ["norm"]},
        ["include='norm' fits none of its 2 layers that multiply: {up,head}"],
    ),
    "a pattern of exclude that fits nothing": (
        deepseek,
        {"exclude": ["model.lm_haed"]},
        ["exclude='model.lm_haed' fits none of its 37 layers that multiply; did you mean 'model.lm_head'?"],
    ),
    "sizes that were asked for": (
        lambda: nn.Sequential(nn.Linear(32, 24), nn.Linear(32, 32)),
        {"include": ["*"]},
        [
            "0: included, but with a weight of 24 x 32: kernels take multiples of 16; exclude it, or choose other "
            "sizes",
        ],
    ),
    "a layer of another kind": (
        lambda: nn.Sequential(Scaled(32, 32), nn.Linear(32, 32)),
        {"include": ["0"]},
        ["0: included, but of another kind: Scaled, not a plain nn.Linear"],
    ),
    "nothing left": (
        lambda: nn.Sequential(nn.Linear(30, 30), nn.Linear(32, 32)),
        {},
        [
            "no layer is left to multiply in FP8 (sizes that are no multiples of 16: 1; taken for the output head: 1)",
        ],
    ),
    "nothing at all": (nn.Sequential, {}, ["no layer is left to multiply in FP8 (it has no linear layers)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused(case):
    make, patterns, problems = REFUSED[case]
    with pytest.raises(ConfigurationError) as refused:
        select(make(), **patterns)
    first, *lines = str(refused.value).splitlines()
    assert first.endswith("cannot be trained in FP8:") and lines == [f"  - {problem}" for problem in problems]


def test_experts_of_odd_sizes_are_told_with_both_weights():
    module = deepseek(moe_intermediate_size=24)
    assert "model.blocks.1.mlp.experts" in select(module).kept
    with pytest.raises(
        ConfigurationError, match=r"model.blocks.\*.mlp.experts, .*experts: included, but with a weight of \d+ x 24:"
    ):
        select(module, include=["*.experts"])
