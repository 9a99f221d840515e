"""The whole model against its definition, against transformers, and as the layers of a pipeline."""

import copy
import pickle

import pytest
import torch

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.interface import InitializesWeights, PipelineModel, as_layers
from tests.deepseek_v3.small import random_batch, random_model, small_config, weights_of
from tests.marks import needs
from tests.oracles import deepseek_v3 as oracle

CASES = {
    "small": {},
    "no_prediction": {"num_nextn_predict_layers": 0},
    "three_depths": {"num_nextn_predict_layers": 3, "num_hidden_layers": 1, "first_k_dense_replace": 1},
    "tied": {"tie_word_embeddings": True},
    "all_moe": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_losses_and_gradients_are_those_of_the_definition(overrides):
    config = small_config(**overrides)
    model = random_model(config)
    batch = random_batch(config, 2, 7, ignored=3)
    weights = weights_of(model)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]

    got = model(batch)
    want = oracle.losses(config, weights, batch["input_ids"], batch["labels"])
    logits, _ = oracle.model(config, weights, batch["input_ids"])

    assert set(got) - {"tokens", "mtp_agreement"} == set(want)
    assert got["tokens"] == 11
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: name + text)
    torch.testing.assert_close(model({"input_ids": batch["input_ids"]}), logits[0], rtol=1e-10, atol=1e-10)

    got["loss"].backward()
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(want["loss"], [weights[name] for name in names], materialize_grads=True)
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-10 * max(1, grad.abs().max().item()))


@needs("transformers")
def test_logits_loss_and_gradients_are_those_of_transformers():
    from tests.oracles.transformers_float64 import in_float64, new_reference

    settings = {
        "vocab_size": 31,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "max_position_embeddings": 128,
    }
    reference = new_reference(**settings, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    ours = {name: value for name, value in settings.items() if name != "num_key_value_heads"}
    config = DeepSeekV3Config(**ours, num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    model = Transformer(config).double()
    model.load_state_dict({ours_of(name): tensor for name, tensor in reference.state_dict().items()})
    batch = random_batch(config, 2, 90)

    with in_float64():
        want = reference(input_ids=batch["input_ids"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(want.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    got = model(batch)
    got["loss"].backward()

    torch.testing.assert_close(model({"input_ids": batch["input_ids"]}), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(got["loss"], loss, rtol=0, atol=1e-11)
    want_grads = {ours_of(name): parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want_grads[name], rtol=1e-8, atol=1e-11)


def ours_of(name: str) -> str:
    """What we call a parameter that transformers, in memory, calls ``name``."""
    return name.removeprefix("model.").replace("layers.", "blocks.")


def test_it_is_a_pipeline_model():
    model = Transformer(small_config())

    assert isinstance(model, PipelineModel) and isinstance(model, InitializesWeights)
    names = [layer.name for layer in model.layers()]
    assert names == ["embed_tokens", "blocks.0", "blocks.1", "blocks.2", "norm", "mtp.0", "mtp.1", "lm_head"]
    assert [layer.name for layer in model.layers() if layer.with_previous] == ["mtp.0", "mtp.1", "lm_head"]
    assert [layer.name for layer in model.layers() if layer.for_loss] == ["mtp.0", "mtp.1"]
    assert all(layer.cost > 0 for layer in model.layers())


@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_belongs_to_a_layer_that_names_it(tie):
    model = Transformer(small_config(tie_word_embeddings=tie))
    of_layers = {id(p) for layer in model.layers() for module in layer.modules for p in module.parameters()}
    assert of_layers == {id(p) for p in model.parameters()}

    shared = {layer.name for layer in model.layers() if model.embed_tokens in layer.modules}
    assert shared == {"embed_tokens", "mtp.0", "mtp.1"} | ({"lm_head"} if tie else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_crosses_a_cut_is_what_was_declared(dtype):
    """Cut before every layer that may be cut from its previous one."""
    model = Transformer(small_config()).to(dtype)
    batch = random_batch(model.config, 3, 6)
    declared = model.boundary(batch)

    values = (model.inputs(batch),)
    for index, layer in enumerate(as_layers(model.layers())):
        if index and not layer.with_previous:
            assert [tuple(value.shape) for value in values] == [spec.shape for spec in declared]
            assert [value.dtype for value in values] == [spec.dtype or dtype for spec in declared]
        values = layer(values, batch)
    assert model.loss(values, batch)["loss"].dtype == torch.promote_types(dtype, torch.float32)


def test_the_cheapest_cut_of_671b_puts_embedding_and_head_with_little_else():
    """Costs are FLOPs: the head with its prediction depth weighs as much as a few layers."""
    with torch.device("meta"):
        layers = Transformer(DeepSeekV3Config.from_preset("671b")).layers()
    cost = {layer.name: layer.cost for layer in layers}

    assert cost["embed_tokens"] < cost["blocks.0"] / 1000
    assert cost["blocks.0"] == cost["blocks.2"] < cost["blocks.3"] * 1.1
    assert 1 < cost["mtp.0"] / cost["blocks.3"] < 1.5
    assert 2 < cost["lm_head"] / cost["blocks.3"] < 4


def test_prediction_needs_no_labels_and_runs_no_prediction_depths():
    model = Transformer(small_config()).eval()
    batch = random_batch(model.config, 2, 5)
    with torch.no_grad():
        logits = model({"input_ids": batch["input_ids"]})
        model.mtp = torch.nn.ModuleList()
        assert torch.equal(model({"input_ids": batch["input_ids"]}), logits)
    assert logits.shape == (2, 5, 29)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 0), (0, 4)])
def test_the_shortest_batches_give_every_parameter_a_gradient(shape):
    """Shorter than the depths of prediction, or empty: zeros, never None, or data-parallel ranks would wait."""
    model = Transformer(small_config(num_nextn_predict_layers=3))
    tokens = torch.randint(29, shape)

    result = model({"input_ids": tokens, "labels": tokens})
    result["loss"].backward()

    assert all(value.isfinite() for value in result.values())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_sequences_of_a_batch_do_not_influence_each_other():
    model = random_model(small_config())
    batch = random_batch(model.config, 4, 9)
    whole = model(batch)
    parts = [model({name: tensor[b : b + 1] for name, tensor in batch.items()}) for b in range(4)]

    assert whole.pop("tokens") == sum(part["tokens"] for part in parts)
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value, rtol=1e-13, atol=1e-13)


def test_the_meta_device_takes_no_memory_and_weights_come_later():
    config = small_config(tie_word_embeddings=True)
    with torch.device("meta"):
        model = Transformer(config)
    assert all(p.is_meta for p in (*model.parameters(), *model.buffers()))

    model = model.to_empty(device="cpu")
    model.initialize_weights(5)
    assert model.lm_head.weight is model.embed_tokens.weight
    batch = random_batch(config, 2, 6)
    assert torch.equal(model(batch)["loss"], Transformer(config, seed=5)(batch)["loss"])


def test_tied_weights_stay_tied_through_casts_and_state_dicts():
    model = Transformer(small_config(tie_word_embeddings=True)).double().to(torch.bfloat16)

    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_routers_of_prediction_depths_are_listed_and_count():
    model = Transformer(small_config())
    batch = random_batch(model.config, 2, 7)
    model(batch)

    counts = {name: router.tokens_per_expert.sum().item() for name, router in model.routers()}
    assert counts == {
        "blocks.1.mlp.gate": 3 * 14,
        "blocks.2.mlp.gate": 3 * 14,
        "mtp.0.block.mlp.gate": 3 * 12,
        "mtp.1.block.mlp.gate": 3 * 10,
    }


def test_copies_list_their_own_layers():
    model = Transformer(small_config())
    batch = random_batch(model.config, 2, 5)
    want = model(batch)["loss"]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(batch)["loss"], want)
        with torch.no_grad():
            clone.norm.weight.zero_()
        assert clone(batch)["loss"] != want and torch.equal(model(batch)["loss"], want)


def test_the_weight_of_multi_token_prediction_may_change_in_training():
    model = Transformer(small_config())
    batch = random_batch(model.config, 2, 5)
    before = model(batch)
    model.mtp_loss_weight = 0.1
    after = model(batch)

    torch.testing.assert_close(before["loss"] - after["loss"], 0.2 * after["mtp_loss"])


def test_autocast_gives_every_parameter_a_float32_gradient():
    model = random_model(small_config(attention_bias=True)).float()
    batch = random_batch(model.config, 2, 70)
    exact = model(batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch)["loss"]
    loss.backward()

    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)  # bfloat16 has 8 bits; some tokens change experts
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_learns():
    """One repeated sequence; from 3.4 nats per token."""
    config = small_config(initializer_range=0.05, num_hidden_layers=2, num_nextn_predict_layers=1)
    batch = {name: tensor.repeat(4, 1) for name, tensor in random_batch(config, 1, 16).items()}
    model = Transformer(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        means = model(batch)
        means["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert means["next_token_loss"] < 1
