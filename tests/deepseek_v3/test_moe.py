"""The mixture of experts against a loop over tokens; shares of it against the whole."""

import pytest
import torch

from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.deepseek_v3.moe import MoE
from lightning_dualpipe.interface import WeightGradients
from lightning_dualpipe.parallel.dispatch import LocalDispatcher
from tests.deepseek_v3.small import randomize, small_config, weights_of
from tests.oracles import deepseek_v3 as oracle

CASES = {
    "small": {},
    "one_shared": {"n_shared_experts": 1},
    "none_shared": {"n_shared_experts": 0},
    "one_group": {"n_group": 1, "topk_group": 1},
    "every_expert": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 12},
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_a_mixture_and_its_gradients_are_those_of_the_definition(overrides):
    config = small_config(**overrides)
    moe = randomize(MoE(config))
    weights = weights_of(moe)
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, requires_grad=True)

    y, balance = moe(x)
    pairs = [oracle.mixture(config, weights, sequence) for sequence in x]
    want, want_balance = (torch.stack(part) for part in zip(*pairs, strict=True))

    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(balance, want_balance, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    parameters = dict(moe.named_parameters())
    got_grads = torch.autograd.grad((y * g).sum() + balance.sum(), [x, *parameters.values()])
    want_grads = torch.autograd.grad(
        (want * g).sum() + want_balance.sum(), [x, *(weights[name] for name in parameters)], materialize_grads=True
    )
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (1, 1)])
def test_experts_without_tokens_get_gradients_of_zeros_not_none(shape):
    config = small_config(aux_loss_alpha=0.1)
    moe = randomize(MoE(config))
    x = torch.randn(*shape, 24, dtype=torch.float64, requires_grad=True)

    y, balance = moe(x)
    (y.sum() + balance.sum()).backward()

    assert y.shape == x.shape and x.grad is not None
    assert all(parameter.grad is not None for parameter in moe.parameters())
    tokens = torch.zeros(12, dtype=torch.int64) + moe.gate.tokens_per_expert
    for expert in range(12):
        assert bool(moe.experts.down_proj.grad[expert].any()) == bool(tokens[expert])


def test_expert_gradients_can_wait():
    config = small_config()
    moe = randomize(MoE(config))
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    moe(x)[0].square().sum().backward()
    want = {name: parameter.grad.clone() for name, parameter in moe.experts.named_parameters()}
    moe.zero_grad()

    moe.experts.weight_gradients = queue = WeightGradients()
    queue.deferring = True
    moe(x)[0].square().sum().backward()
    assert all(parameter.grad is None for parameter in moe.experts.parameters())
    queue.run(len(queue))
    for name, parameter in moe.experts.named_parameters():
        assert torch.equal(parameter.grad, want[name])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_share_of_the_experts_keeps_its_rows(device):
    with torch.device(device):
        experts = Experts(8, 6, 4)
    if device == "cpu":
        torch.nn.init.normal_(experts.gate_up_proj), torch.nn.init.normal_(experts.down_proj)
    whole = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    experts.requires_grad_(False)

    experts.keep_experts(0, 8)
    experts.keep_experts(2, 4)
    experts.keep_experts(4, 2)

    assert (experts.first_expert, experts.num_experts) == (4, 2)
    for name, parameter in experts.named_parameters():
        assert parameter.shape == whole[name][4:6].shape and not parameter.requires_grad
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert device == "meta" or torch.equal(parameter, whole[name][4:6])
    with pytest.raises(AssertionError, match=r"experts 2\.\.3 are not all among 4\.\.5"):
        experts.keep_experts(2, 2)


class OneOfTwo(LocalDispatcher):
    """Half the experts live here; rows of the others are dropped, so that two halves add up to the whole."""

    def __init__(self, num_experts, half):
        super().__init__(num_experts)
        self.num_local_experts = num_experts // 2
        self.first_local_expert = half * num_experts // 2

    def dispatch(self, x_ND, weights_NK, experts_NK):
        mine = (experts_NK >= self.first_local_expert) & (experts_NK < self.first_local_expert + self.num_local_experts)
        local = (experts_NK - self.first_local_expert).where(mine, self.num_local_experts - 1)
        return super().dispatch(x_ND, weights_NK.where(mine, 0), local)


def test_mixtures_that_share_the_experts_add_up_to_the_whole():
    config = small_config(n_shared_experts=0)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    whole = randomize(MoE(config))
    want, _ = whole(x)

    total = torch.zeros_like(x)
    for half in range(2):
        moe = MoE(config).double()
        moe.load_state_dict(whole.state_dict())
        moe.use_dispatcher(OneOfTwo(12, half))
        assert moe.experts.gate_up_proj.shape[0] == 6 and moe.num_experts == 12
        total += moe(x)[0]
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)
