"""Routing, bias and balance loss against plain loops over tokens and experts."""

import copy

import pytest
import torch

from lightning_dualpipe.deepseek_v3.router import Router, balance_loss
from tests.deepseek_v3.small import randomize, small_config
from tests.oracles import deepseek_v3 as oracle

CASES = {
    "small": {},
    "one_group": {"n_group": 1, "topk_group": 1},
    "every_group": {"n_group": 3, "topk_group": 3},
    "one_of_many_groups": {"n_group": 6, "topk_group": 1, "num_experts_per_tok": 2},
    "all_experts_of_the_groups": {"num_experts_per_tok": 6},
    "not_normalised": {"norm_topk_prob": False, "routed_scaling_factor": 0.7},
    "one_expert": {"n_routed_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_choices_weights_and_gradients_are_those_of_the_definition(overrides):
    config = small_config(**overrides)
    router = randomize(Router(config))
    weight = router.weight.detach().clone().requires_grad_()
    x = torch.randn(3, 11, config.hidden_size, dtype=torch.float64)

    weights_NK, experts_NK, balance_B = router(x)

    scores = torch.sigmoid(x @ weight.T)
    routes = [oracle.route(config, token, router.e_score_correction_bias) for token in scores.flatten(0, 1)]
    want_weights = torch.stack([torch.stack([weight for _, weight in route]) for route in routes])
    want_balance = torch.stack([11 * oracle.balance(config, sequence) for sequence in scores])
    assert experts_NK.tolist() == [[expert for expert, _ in route] for route in routes]
    torch.testing.assert_close(weights_NK, want_weights, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(balance_B, want_balance, rtol=1e-13, atol=1e-13)

    g = torch.randn_like(weights_NK)
    (got,) = torch.autograd.grad((weights_NK * g).sum() + balance_B.sum(), router.weight)
    (want,) = torch.autograd.grad((want_weights * g).sum() + want_balance.sum(), weight)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def with_scores(router, scores):
    """``router`` on the identity: one token per row, the given affinities."""
    router.weight = torch.nn.Parameter(torch.logit(torch.tensor(scores, dtype=torch.float64)).T.contiguous())
    return router(torch.eye(len(scores), dtype=torch.float64)[None])


def test_groups_are_judged_by_the_sum_of_their_best_two():
    """The single best expert is alone in its group; two good ones together win."""
    config = small_config(n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2, hidden_size=1)
    _, experts, _ = with_scores(Router(config).double(), [[0.9, 0.1, 0.1, 0.6, 0.6, 0.1]])
    assert sorted(experts[0].tolist()) == [3, 4]


def test_experts_of_other_groups_lose_even_to_negative_scores():
    """With 0 for -inf, as the first released code had it, experts of the wrong group would win."""
    config = small_config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, hidden_size=1)
    router = Router(config).double()
    router.e_score_correction_bias.fill_(-5.0)
    _, experts, _ = with_scores(router, [[0.2, 0.2, 0.9, 0.8]])
    assert sorted(experts[0].tolist()) == [2, 3]


def test_the_bias_chooses_but_does_not_weigh():
    config = small_config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, hidden_size=1)
    router = Router(config).double()
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    weights, experts, _ = with_scores(router, [[0.5, 0.4, 0.1, 0.3]])
    assert experts[0].tolist() == [2, 0]
    torch.testing.assert_close(weights[0].tolist(), [2.5 * 0.1 / 0.6, 2.5 * 0.5 / 0.6])


def test_ties_choose_distinct_experts_of_the_best_score():
    config = small_config(n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3, hidden_size=1)
    weights, experts, balance = with_scores(Router(config).double(), [[0.5] * 6, [0.5, 0.5, 0.5, 0.5, 0.1, 0.1]])

    assert all(len(set(chosen)) == 3 for chosen in experts.tolist())
    assert set(experts[1].tolist()) < {0, 1, 2, 3}
    torch.testing.assert_close(weights, torch.full_like(weights, 2.5 / 3))
    assert balance.isfinite().all()


def test_counts_are_kept_in_training_only_and_once_per_forward():
    router = Router(small_config())
    x = torch.randn(2, 5, 24)
    _, experts, _ = router(x)
    counts = torch.bincount(experts.flatten(), minlength=12)
    assert torch.equal(router.tokens_per_expert, counts)

    with torch.no_grad():
        router(x)
    router.eval()(x)
    assert torch.equal(router.tokens_per_expert, counts)

    router.train()(x)
    assert torch.equal(router.tokens_per_expert, 2 * counts)
    assert "tokens_per_expert" not in router.state_dict()


def test_the_bias_moves_against_the_load_and_rests_at_the_mean():
    router = Router(small_config(n_routed_experts=4, n_group=1, topk_group=1))
    router.tokens_per_expert += 3

    router.update_bias(torch.tensor([10, 0, 2, 4]), 1e-3)
    assert router.e_score_correction_bias.tolist() == pytest.approx([-1e-3, 1e-3, 1e-3, 0.0])
    assert router.tokens_per_expert.tolist() == [0] * 4

    router.update_bias(torch.tensor([0, 0, 0, 0]), 1e-3)
    assert router.e_score_correction_bias.tolist() == pytest.approx([-1e-3, 1e-3, 1e-3, 0.0])

    # a mean that float32 could not hold: 2^53 + 1 over 4 experts
    router.update_bias(torch.tensor([2**53 + 1, 2**53, 2**53, 2**53]), 1e-3)
    assert router.e_score_correction_bias.tolist() == pytest.approx([-2e-3, 2e-3, 2e-3, 1e-3])


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_the_bias_stays_float32_in_every_precision(cast):
    router = Router(small_config())
    router.e_score_correction_bias.fill_(0.30001)
    before = router.e_score_correction_bias.clone()
    getattr(router, cast)()
    router = copy.deepcopy(router.to(torch.bfloat16))

    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.e_score_correction_bias, before)
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.tokens_per_expert.dtype == torch.int64


def test_the_bias_is_float32_after_the_meta_device_too():
    with torch.device("meta"):
        router = Router(small_config()).to(torch.bfloat16)
    router = router.to_empty(device="cpu")

    assert router.e_score_correction_bias.dtype == torch.float32
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.zero_()
    router(torch.randn(1, 4, 24).bfloat16())
    assert router.tokens_per_expert.sum() == 4 * 3


def test_affinities_are_float32_in_half_types_and_under_autocast():
    config = small_config()
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 9, 24)
    want = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(x)

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    assert router.bfloat16()(x.bfloat16())[0].dtype == torch.float32


def test_an_even_load_has_balance_loss_alpha_per_token():
    """f_i = 1 and P_i = 1 / E for every expert: the loss is alpha, times T."""
    scores = 0.5 + 1e-9 * torch.eye(6, dtype=torch.float64).roll(1, 0)[None]
    loss = balance_loss(scores, torch.ones(1, 6), top_k=1, alpha=0.25)
    torch.testing.assert_close(loss, torch.tensor([6 * 0.25], dtype=torch.float64))


def test_no_tokens_and_no_alpha_are_zero_with_gradients_of_zeros():
    router = Router(small_config())
    torch.nn.init.normal_(router.weight)
    weights, experts, balance = router(torch.randn(2, 0, 24))
    (weights.sum() + balance.sum()).backward()

    assert weights.shape == experts.shape == (0, 3) and balance.tolist() == [0, 0]
    assert torch.equal(router.weight.grad, torch.zeros(12, 24))
    assert balance_loss(torch.rand(2, 3, 4), torch.ones(2, 3), top_k=2, alpha=0).tolist() == [0, 0]
