"""Recomputing changes what is kept, and not a bit of what comes out."""

from contextlib import nullcontext

import pytest
import torch

from lightning_dualpipe import DeepSeekV3
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.recompute import compute_phase, forgets, rebuildable, rebuilt
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.parallel.dispatch import LocalDispatcher
from lightning_dualpipe.precision.linear import make_linears_deferrable
from tests.deepseek_v3.kept import bytes_alive_after
from tests.deepseek_v3.small import random_batch, randomize, small_config
from tests.marks import needs_cuda

MODELS = {
    "small": {},
    "queries_not_compressed": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "no_shared_experts": {"n_shared_experts": 0},
    "dense_only": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "tied": {"tie_word_embeddings": True},
}
PRECISIONS = {
    "64": (torch.float64, nullcontext),
    "32": (torch.float32, nullcontext),
    "bf16-true": (torch.bfloat16, nullcontext),
    "bf16-mixed": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
}


def build(recompute, *, dtype=torch.float64, **overrides):
    model = randomize(Transformer(small_config(**overrides), recompute=recompute)).to(dtype)
    assert isinstance(model, Transformer)
    return model


def step(model, batch, *, context=nullcontext, deferring=False):
    """Means, gradients and counts of one forward and backward; weight gradients that can wait come last."""
    queue = WeightGradients()
    make_linears_deferrable(model, queue)
    with context():
        means = model(batch)
    queue.deferring = deferring
    means["loss"].backward()
    assert (len(queue) > 0) == deferring
    queue.run(len(queue))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    counts = {name: router.tokens_per_expert for name, router in model.routers()}
    return {name: mean.detach() for name, mean in means.items()}, gradients, counts


@pytest.mark.parametrize("deferring", [False, True], ids=["at_once", "deferred"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_losses_gradients_and_counts_have_the_same_bits(overrides, precision, deferring):
    dtype, context = PRECISIONS[precision]
    batch = random_batch(small_config(), 2, 12, ignored=3)
    want, *others = (
        step(build(recompute, dtype=dtype, **overrides), batch, context=context, deferring=deferring)
        for recompute in ("none", "selective", "full")
    )
    for got in others:
        for mine, expected in zip(got, want, strict=True):
            assert mine.keys() == expected.keys()
            assert [name for name in mine if not torch.equal(mine[name], expected[name])] == []


def test_sequences_too_long_to_keep_probabilities_have_the_same_bits():
    batch = random_batch(small_config(), 1, 300)
    want, *others = (step(build(recompute), batch) for recompute in ("none", "selective", "full"))
    for got in others:
        assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_the_bias_takes_the_same_course(recompute):
    def course(recompute):
        model, biases = build(recompute), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(4):
            optimizer.zero_grad()
            tokens = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(seed))
            for part in tokens.split(1):  # gradients are accumulated
                model({"input_ids": part[:, :-1], "labels": part[:, 1:]})["loss"].backward()
            optimizer.step()
            for _, router in model.routers():
                router.update_bias(router.tokens_per_expert, 0.05)
                biases.append(router.e_score_correction_bias.clone())
        return torch.stack(biases)

    assert torch.equal(course(recompute), course("none"))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_is_sent_twice(recompute, monkeypatch):
    sent = []
    for name in ("sent", "sent_back"):
        original = getattr(LocalDispatcher, name)
        monkeypatch.setattr(
            LocalDispatcher, name, lambda *args, name=name, original=original: (sent.append(name), original(*args))[1]
        )
    step(build(recompute), random_batch(small_config(), 2, 8))
    assert sent == ["sent", "sent_back"] * 4  # two blocks and two depths


def test_only_phases_that_compute_are_marked_to_run_again():
    def marked(recompute):
        with torch.device("meta"):
            layers = Transformer(small_config(), recompute=recompute).layers()
        return {(layer.name, phase.name) for layer in layers for phase in layer.phases if phase.recompute}

    assert marked("none") == marked("selective") == set()
    names = ("attend", "shared_experts", "experts")
    assert marked("full") == {
        *(("blocks.0", name) for name in ("attend", "feed_forward")),
        *((layer, name) for layer in ("blocks.1", "blocks.2", "mtp.0", "mtp.1") for name in names),
        *((layer, "join") for layer in ("mtp.0", "mtp.1")),
    }


def test_a_waiting_weight_gradient_holds_no_more_than_without():
    """After the input gradients: what the queue holds, and the gradients that could not wait."""
    config = small_config(vocab_size=8, n_routed_experts=4, n_group=1, topk_group=1)
    batch = random_batch(config, 1, 300)

    def alive(recompute):
        model, queue = randomize(Transformer(config, recompute=recompute)), WeightGradients()
        make_linears_deferrable(model, queue)
        queue.deferring = True
        return bytes_alive_after(lambda: model(batch)["loss"].backward())

    none, selective = alive("none"), alive("selective")
    assert none * 0.5 < selective <= none


def test_prediction_and_validation_take_no_notes():
    model = build("selective")
    with torch.no_grad():
        logits = model({"input_ids": torch.arange(8)[None]})
    assert torch.equal(logits, build("none")({"input_ids": torch.arange(8)[None]}))
    assert not forgets()


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="recompute='some' is not one of none, selective, selective_fp8, full"):
        DeepSeekV3(recompute="some")  # type: ignore[arg-type]
    assert DeepSeekV3(recompute="full").hparams["recompute"] == "full"


# ---- notes ------------------------------------------------------------------------------------


def squares(calls):
    def square(x):
        calls.append(x.shape)
        return x * x

    return square


def run(function, *leaves):
    phase = compute_phase("test", lambda *values: (function(*values),), "selective")
    (y,) = phase(leaves, {})
    return y


def test_what_two_save_is_rebuilt_once_and_again_for_another_backward():
    calls = []
    square = squares(calls)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    y = run(lambda x: (lambda s: s.exp() * s.sin() + s * s)(rebuilt(square, x)), x)
    assert len(calls) == 1
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert len(calls) == 2
    second = torch.autograd.grad(y.sum(), x)

    s = x.detach().square()
    want = (s.exp() * s.sin() + s.exp() * s.cos() + 2 * s) * 2 * x.detach()
    torch.testing.assert_close(first[0], want, rtol=1e-13, atol=1e-13)
    assert torch.equal(first[0], second[0])


def test_what_was_forgotten_can_be_what_something_else_is_rebuilt_from():
    outer, inner = [], []
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def function(x):
        s = rebuilt(squares(inner), x)
        return rebuilt(squares(outer), s).sin() + s.cos()

    (got,) = torch.autograd.grad(run(function, x).sum(), x)
    assert len(inner) == len(outer) == 2
    s = x.detach().square()
    torch.testing.assert_close(got, (s.square().cos() * 2 * s - s.sin()) * 2 * x.detach(), rtol=1e-13, atol=1e-13)


def test_views_of_it_are_forgotten_too():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    kept = bytes_alive_after(lambda: run(lambda x: rebuilt(torch.exp, x).mT[1:3, ::2].sin().sum(), x))
    plain = bytes_alive_after(lambda: x.exp().mT[1:3, ::2].sin().sum())
    # exp keeps its own result; all else that remains is the sum
    assert kept == plain == 4 * 6 * 8 + 8

    def double(x):
        return 2 * x

    kept = bytes_alive_after(lambda: run(lambda x: rebuilt(double, x).mT[1:3, ::2].sin().sum(), x))
    assert kept == 8
    (got,) = torch.autograd.grad(run(lambda x: rebuilt(double, x).mT[1:3, ::2].sin().sum(), x), x)
    (want,) = torch.autograd.grad((2 * x).mT[1:3, ::2].sin().sum(), x)
    assert torch.equal(got, want)


def test_memory_that_was_freed_and_used_again_is_not_mistaken():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)

    def function(x):
        total = x.sum()
        for factor in range(1, 20):
            total = total + rebuilt(torch.mul, x, torch.full_like(x, factor)).sum()  # freed at once
            total = total + (x * factor).sin().sum()  # likely the same address
        return total

    (got,) = torch.autograd.grad(run(function, x), x)
    (want,) = torch.autograd.grad(function(x), x)
    assert torch.equal(got, want)


def test_what_is_written_to_is_kept():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(run(lambda x: rebuilt(torch.mul, x, x).add_(1).sin().sum(), x), x)
    torch.testing.assert_close(got, (x * x + 1).cos() * 2 * x, rtol=1e-13, atol=1e-13)


def test_what_another_phase_made_is_rebuilt_here():
    calls = []
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    square = squares(calls)
    made = square(x).detach().requires_grad_()
    y = run(lambda made, x: rebuildable(made, square, x).sin(), made, x)
    want = made.detach().cos()
    (got,) = torch.autograd.grad(y.sum(), made)
    assert torch.equal(got, want) and len(calls) == 2


def test_outside_of_a_phase_everything_is_as_without():
    calls = []
    x = torch.randn(5, requires_grad=True)
    rebuilt(squares(calls), x).sin().sum().backward()
    assert len(calls) == 1 and not forgets()


# ---- kernels of a GPU -------------------------------------------------------------------------


@needs_cuda
def test_fused_attention_forgets_queries_keys_and_values_too():
    """Loose: backwards of fused attention add in whatever order their blocks arrive."""
    config = small_config(
        hidden_size=256, num_attention_heads=8, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    )
    found = []
    for recompute in ("none", "selective", "full"):
        model = randomize(Transformer(config, recompute=recompute)).to("cuda", torch.bfloat16)
        batch = {name: value.cuda() for name, value in random_batch(config, 2, 512).items()}
        model(batch)  # libraries and tables
        before = torch.cuda.memory_allocated()
        loss = model(batch)["loss"]
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        found.append((kept, loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (none, loss, gradients), *others = found
    for kept, again, got in others:
        assert kept < 0.75 * none
        assert torch.equal(loss, again)
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=0.05, atol=0.02 * float(gradient.abs().max()))
