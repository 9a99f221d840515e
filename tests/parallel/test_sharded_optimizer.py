"""An optimizer that is shared out does what one optimizer with all parameters does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from lightning_dualpipe.parallel.sharded_optimizer import ShardedOptimizer
from lightning_dualpipe.precision.bf16_adamw import BF16AdamW
from lightning_dualpipe.precision.main_gradients import keep_main_gradients
from tests.ranks import run_ranks

STEPS = 4
SHAPES = {"a": (5, 7), "b": (64, 9), "c": (33, 2), "d": (3, 40), "mine": (3, 3)}
HOLDERS = {"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 1, 2), "d": (1, 2), "mine": (0,)}


class Normalized(Optimizer):
    """A stranger's, whose update of an element depends on the whole parameter: steps of fixed length."""

    def __init__(self, groups, lr=0.1):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            result = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.5)
                    parameter -= group["lr"] * mean / mean.norm()
        return result


MAKE = {
    "AdamW": lambda groups: AdamW(groups, lr=0.1),
    "AdamW, fused": lambda groups: AdamW(groups, lr=0.1, fused=True),
    "AdamW, one by one": lambda groups: AdamW(groups, lr=0.1, foreach=False, amsgrad=True),
    "SGD": lambda groups: SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "SGD without states": lambda groups: SGD(groups, lr=0.1),
    **{
        name: getattr(torch.optim, name)
        for name in "Adadelta Adagrad Adam Adamax ASGD NAdam RAdam RMSprop Rprop".split()
    },
    "AdamW, moments in bfloat16": lambda groups: BF16AdamW(groups, lr=0.1),
    "Adafactor": lambda groups: Adafactor(groups, lr=0.1),
    "Muon": lambda groups: Muon(groups, lr=0.1),
    "a stranger's": Normalized,
}
SLICED = set(MAKE) - {"Adafactor", "Muon", "a stranger's"}


def build(names, dtype):
    """Parameters with values and gradients that follow from their names."""
    values = {name: torch.randn(SHAPES[name], generator=_seeded(name, -1)) for name in names}
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def give_gradients(named, step):
    for name, parameter in named.items():
        gradient = torch.randn(parameter.shape, generator=_seeded(name, step))
        parameter.grad = None if (name, step) == ("c", 1) else gradient.to(parameter.grad_dtype)


def _seeded(name, step):
    return torch.Generator().manual_seed(1000 * step + 10_000 + ord(name[0]))


def train(named, make, share_out=lambda optimizer: None):
    """Two groups, a schedule, a parameter that is frozen for two steps, and one that comes for the last step."""
    groups = [[named[name] for name in names if name in named] for names in (("a", "mine"), ("b", "d"), ("c",))]
    optimizer = make([{"params": groups[0]}, {"params": groups[1], "lr": 0.02}])
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    share_out(optimizer)
    for step in range(STEPS):
        named["b"].requires_grad_(step > 1)
        if step == STEPS - 1:
            optimizer.add_param_group({"params": groups[2]})

        def closure(step=step):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            give_gradients({name: p for name, p in named.items() if p.requires_grad}, step)
            return step

        assert optimizer.step(closure) == step
        assert [group["params"] for group in optimizer.param_groups] == groups[: len(optimizer.param_groups)]
        if step < STEPS - 2:
            schedule.step()
    return optimizer


def sizes(optimizer):
    """Bytes of state that grow with the parameter."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if torch.is_tensor(value) and value.ndim)


def _on_rank(rank, make, dtype=torch.float64, main=False):
    named = build([name for name, holders in HOLDERS.items() if rank in holders], dtype)
    if main:
        keep_main_gradients(named.values())
    replicas = ReplicaGroups({name: HOLDERS[name] for name in named}, rank=rank, bucket_bytes=1000)
    wrapped = []
    optimizer = train(named, MAKE[make], lambda it: wrapped.append(ShardedOptimizer(it, lambda: named, replicas)))
    wrapped[0].release()
    assert sum(len(group["params"]) for group in optimizer.state_dict()["param_groups"]) == len(wrapped[0].shards)
    mains = {name: (shard.elements, shard.stepped.detach()) for name, shard in wrapped[0].shards.items()}
    return {name: parameter.detach() for name, parameter in named.items()}, sizes(optimizer), mains


@pytest.mark.parametrize("make", MAKE)
def test_parameters_are_those_of_one_optimizer_and_states_are_on_one_rank_each(make):
    expected = build(HOLDERS, torch.float64)
    whole = sizes(train(expected, MAKE[make]))

    found = run_ranks(3, _on_rank, make)

    for named, _, _ in found:
        for name, values in named.items():
            torch.testing.assert_close(values, expected[name].data, rtol=1e-12, atol=1e-12)
    assert sum(size for _, size, _ in found) == whole
    if make in SLICED and whole:
        assert max(size for _, size, _ in found) < whole / 2  # of three; some parameters have one or two holders


@pytest.mark.parametrize("make", ["AdamW", "AdamW, moments in bfloat16", "SGD", "Muon"])
def test_a_main_weight_is_what_an_optimizer_in_float32_computes(make):
    """The same gradients, bit for bit: parameters in bfloat16 are its rounded copies, on every rank."""
    expected = {name: nn.Parameter(p.data.float()) for name, p in build(HOLDERS, torch.bfloat16).items()}
    train(expected, MAKE[make])

    for named, _, mains in run_ranks(3, _on_rank, make, torch.bfloat16, True):
        for name, values in named.items():
            assert torch.equal(values, expected[name].data.bfloat16()), name
        for name, (elements, values) in mains.items():
            whole = expected[name].data
            part = whole if elements is None else whole.flatten()[elements.start : elements.stop]
            assert values.dtype == torch.float32 and torch.equal(values, part), name


def test_steps_too_small_for_bfloat16_add_up_in_the_main_weight():
    moved = {}
    for main in (True, False):
        weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        if main:
            keep_main_gradients([weight])
        optimizer = SGD([weight], lr=1e-3)
        ShardedOptimizer(optimizer, lambda weight=weight: {"weight": weight}, alone())
        for _ in range(100):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step()
        moved[main] = 1 - weight.detach()[0].item()
    assert moved == {True: pytest.approx(0.1, abs=2**-9), False: 0.0}


def test_a_main_weight_follows_what_is_written_to_its_parameter():
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    keep_main_gradients([weight])
    optimizer = SGD([weight], lr=1e-4)
    sharded = ShardedOptimizer(optimizer, lambda: {"weight": weight}, alone())

    def step():
        weight.grad = torch.ones(2)
        optimizer.step()

    step()
    weight.data[1] = 5.0
    step()
    assert sharded.shards["weight"].stepped.tolist() == pytest.approx([1 - 2e-4, 5 - 1e-4], abs=1e-6)
    before = weight.data.clone()
    weight.data.zero_()  # weight averaging does this for a validation
    weight.data.copy_(before)
    step()
    assert sharded.shards["weight"].stepped.tolist() == pytest.approx([1 - 3e-4, 5 - 2e-4], abs=1e-6)


def _writes_on_rank(rank, make, dtype):
    """Of each parameter, whether a step that changed it has also moved the counter of writes to it."""
    named = build([name for name, holders in HOLDERS.items() if rank in holders], dtype)
    keep_main_gradients(named.values())
    replicas = ReplicaGroups({name: HOLDERS[name] for name in named}, rank=rank)
    optimizer = MAKE[make](list(named.values()))
    ShardedOptimizer(optimizer, lambda: named, replicas)
    give_gradients(named, 0)
    before = {name: (parameter.detach().clone(), parameter._version) for name, parameter in named.items()}
    optimizer.step()
    return {
        name: (not torch.equal(named[name], values), named[name]._version > version)
        for name, (values, version) in before.items()
    }


@pytest.mark.parametrize("make", ["AdamW, fused", "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_a_write_to_every_parameter_whoever_owns_it(make, dtype):
    """Whoever keeps something that was made of a weight, in FP8 for instance, knows by its version when it is stale."""
    for seen in run_ranks(3, _writes_on_rank, make, dtype):
        assert all(changed and counted for changed, counted in seen.values()), seen


def test_an_optimizer_that_mixes_all_parameters_is_refused():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigurationError, match="LBFGS multiplies the gradients of all parameters"):
        ShardedOptimizer(LBFGS([weight]), lambda: {"weight": weight}, alone())


def alone():
    assert not dist.is_initialized()
    return ReplicaGroups({"weight": (0,)}, rank=0)
