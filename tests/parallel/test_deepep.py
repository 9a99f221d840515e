"""The adapter, with a stand-in that keeps DeepEP's promises on the CPU: which kernels run is not ours to test."""

import sys

import pytest
import torch
import torch.distributed as dist

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.deepep import DeepEPBuffers, DeepEPDispatcher, why_not_deepep
from lightning_dualpipe.parallel.dispatch import LocalDispatcher
from tests.parallel import fake_deep_ep
from tests.parallel.test_node_dispatch import integers, linear_layer, rows_of
from tests.ranks import run_ranks

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def _install(version, monkeypatch=None):
    """``deep_ep`` as that version has it."""
    module = type(sys)("deep_ep")
    vars(module).update({name: value for name, value in vars(fake_deep_ep).items() if not name.startswith("__")})
    if version == 1:
        del module.ElasticBuffer
    module.__spec__ = fake_deep_ep.__spec__
    if monkeypatch is None:
        sys.modules["deep_ep"] = module
    else:
        monkeypatch.setitem(sys.modules, "deep_ep", module)


def _on_rank(rank, version, tokens):
    _install(version)
    buffers = DeepEPBuffers(dist.group.WORLD)
    dispatchers = [DeepEPDispatcher(8, buffers) for _ in range(2)]  # two layers share the buffer
    given = rows_of(rank, tokens, integers(sum(tokens), dtype=BF16))
    first, second = (linear_layer(dispatcher, *given) for dispatcher in dispatchers)
    assert all(map(torch.equal, first, second))
    return first, fake_deep_ep.ElasticBuffer.made


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tokens", [(6, 3), (0, 5), (4, 1, 0, 7), (150, 2)], ids=str)
def test_values_and_gradients_are_those_of_one_rank(version, tokens):
    """Integers: whatever the order of additions, the bits are the same."""
    want = linear_layer(LocalDispatcher(8), *integers(sum(tokens), dtype=BF16))
    results, made = zip(*run_ranks(len(tokens), _on_rank, version, tokens), strict=True)
    for got, expected in zip(zip(*results, strict=True), want, strict=True):
        assert torch.equal(torch.cat(got), expected)
    assert set(made) == {version - 1}


def _half_weights(rank):
    _install(2)
    x, weights, *rest = rows_of(rank, (6, 3), integers(9, dtype=BF16))
    return linear_layer(DeepEPDispatcher(8, DeepEPBuffers(dist.group.WORLD)), x, weights.bfloat16(), *rest)


def test_weights_of_another_type_travel_as_float32_and_come_home_as_they_were():
    x, weights, *rest = integers(9, dtype=BF16)
    want = linear_layer(LocalDispatcher(8), x, weights.bfloat16(), *rest)
    for got, expected in zip(zip(*run_ranks(2, _half_weights), strict=True), want, strict=True):
        assert torch.equal(torch.cat(got), expected) and got[0].dtype == expected.dtype


def _grows(rank):
    _install(2)
    dispatcher = DeepEPDispatcher(8, DeepEPBuffers(dist.group.WORLD))
    for tokens in ((5, 3), (100, 2), (2, 129)):
        linear_layer(dispatcher, *rows_of(rank, tokens, integers(sum(tokens), dtype=BF16)))
    return fake_deep_ep.ElasticBuffer.made


def test_the_buffer_grows_on_all_ranks_with_the_tokens_of_the_one_that_has_most():
    assert run_ranks(2, _grows) == [2, 2]


def _other_dtype(rank):
    _install(2)
    with pytest.raises(ConfigurationError, match=r"DeepEP sends bfloat16, .*float32; use precision='bf16-true'"):
        linear_layer(DeepEPDispatcher(8, DeepEPBuffers(dist.group.WORLD)), *integers(3, dtype=torch.float32))


def test_other_types_than_bfloat16_are_refused():
    run_ranks(2, _other_dtype)


@pytest.mark.parametrize(
    ("version", "device", "dtype", "ranks", "nodes", "reason"),
    [
        (2, torch.device("cpu"), BF16, 8, 1, "needs CUDA devices, and this run computes on cpu"),
        (None, CUDA, BF16, 8, 1, "not installed"),
        (2, CUDA, torch.float32, 8, 1, "use precision='bf16-true'"),
        (1, CUDA, BF16, 6, 1, "Unsupported number of EP ranks: 6"),
        (1, CUDA, BF16, 8, 2, "8 ranks on 2 nodes; install DeepEP 2"),
        (1, CUDA, BF16, 8, None, "8 ranks on uneven nodes"),
        (1, CUDA, BF16, 4, 1, None),
        (1, CUDA, BF16, 16, 2, None),
        (2, CUDA, BF16, 6, 3, None),
    ],
)
def test_the_reason_it_cannot_be_used_is_told(version, device, dtype, ranks, nodes, reason, monkeypatch):
    if version is not None:
        _install(version, monkeypatch)
    found = why_not_deepep(device, dtype, num_ranks=ranks, num_nodes=nodes)
    assert found is None if reason is None else reason in found
