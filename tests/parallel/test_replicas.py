import torch
import torch.distributed as dist

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.replicas import ReplicaGroups
from tests.ranks import run_ranks

HOLDERS = {  # four ranks; they belong to different numbers of groups
    "embedding": (0, 3),
    "shared": (0, 1, 2, 3),
    "first": (0, 1),
    "second": (2, 3),
    "expert": (1, 3),
    "mine0": (0,),
    "mine1": (1,),
}


def held(rank):
    """This rank's names, in an order of its own."""
    names = [name for name, ranks in HOLDERS.items() if rank in ranks]
    return names if rank % 2 else names[::-1]


def parameter(value, dtype=torch.float64, shape=(2, 3)):
    result = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    result.grad = None if value is None else torch.full(shape, float(value), dtype=dtype)
    return result


def _sums(rank, dtype, bucket_bytes):
    replicas = ReplicaGroups({name: HOLDERS[name] for name in held(rank)}, rank=rank, bucket_bytes=bucket_bytes)
    parameters = {name: parameter(10**rank, dtype) for name in held(rank)}
    before = {name: each.grad for name, each in parameters.items()}
    replicas.sum_gradients(parameters)
    assert all(each.grad is before[name] for name, each in parameters.items())  # in place
    assert all(replicas.num_holders(name) == len(HOLDERS[name]) for name in held(rank))
    return {name: each.grad.unique().tolist() for name, each in parameters.items()}


def test_a_gradient_is_summed_over_every_rank_that_holds_it():
    for dtype, bucket_bytes in ((torch.float64, 1), (torch.float32, 60), (torch.float32, 2**20)):
        for rank, found in enumerate(run_ranks(4, _sums, dtype, bucket_bytes)):
            assert found == {name: [float(sum(10**holder for holder in HOLDERS[name]))] for name in held(rank)}


def _mixed(rank):
    """Buckets of several dtypes and shapes, one gradient that does not lie in memory as its shape says."""
    shapes = {"a": (3,), "b": (), "c": (0, 4), "d": (5, 2), "e": (7,)}
    dtypes = {"a": torch.bfloat16, "d": torch.float64}
    parameters = {}
    for name, shape in shapes.items():
        parameters[name] = torch.nn.Parameter(torch.zeros(shape, dtype=dtypes.get(name, torch.float32)))
        parameters[name].grad = torch.full_like(parameters[name], rank + 1)
    parameters["d"].grad = torch.arange(10.0, dtype=torch.float64).reshape(2, 5).T
    parameters["frozen"] = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    replicas = ReplicaGroups(dict.fromkeys(parameters, (0, 1, 2)), rank=rank, bucket_bytes=30)
    replicas.sum_gradients(parameters)
    assert parameters["frozen"].grad is None
    return {name: parameters[name].grad for name in shapes}


def test_dtypes_shapes_and_strides_may_differ():
    for found in run_ranks(3, _mixed):
        for name in "abce":
            assert torch.equal(found[name], torch.full_like(found[name], 6)), name
        assert found["a"].dtype == torch.bfloat16
        assert torch.equal(found["d"], 3 * torch.arange(10.0, dtype=torch.float64).reshape(2, 5).T)


def _missing(rank):
    parameters = {
        "on both": parameter(rank + 1),
        "on one": parameter(None if rank == 0 else 5),
        "on none": parameter(None),
        "alone": parameter(None),
    }
    holders = dict.fromkeys(parameters, (0, 1)) | {"alone": (rank,)}
    if rank == 1:  # each rank has a tensor of its own name
        holders["alone too"], parameters["alone too"] = holders.pop("alone"), parameters.pop("alone")
    ReplicaGroups(holders, rank=rank).sum_gradients(parameters)
    return [None if each.grad is None else each.grad.unique().tolist() for each in parameters.values()]


def test_a_missing_gradient_counts_as_zeros_and_stays_missing_if_all_miss_it():
    assert run_ranks(2, _missing) == [[[3.0], [5.0], None, None]] * 2


def _several_backwards(rank, holders):
    """Manual optimization: backward, backward, step; as ``Strategy.backward`` does it."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    replicas = ReplicaGroups({"weight": holders}, rank=rank)

    def backward(value):
        replicas.unsum({"weight": weight})
        (weight.sum() * value).backward()
        replicas.sum_gradients({"weight": weight})
        return weight.grad[0].item()

    found = [backward(rank + 1.0), backward(10.0 * (rank + 1))]
    weight.grad *= 0.5  # a clip, the same on all holders
    found.append(backward(100.0))
    weight.grad.zero_()
    found.append(backward(rank + 1.0))
    weight.grad = None
    found.append(backward(rank + 1.0))
    # several backwards before one sum: accumulation
    (weight.sum() * 7).backward()
    weight.grad = None
    replicas.unsum({"weight": weight})
    (weight.sum() * 1).backward()
    replicas.unsum({"weight": weight})
    (weight.sum() * 2).backward()
    replicas.sum_gradients({"weight": weight})
    return [*found, weight.grad[0].item()]


def test_several_backwards_before_a_step_add_up_once():
    assert run_ranks(2, _several_backwards, (0, 1)) == [[3.0, 33.0, 16.5 + 200, 3.0, 3.0, 6.0]] * 2


def _frozen_for_a_while(rank):
    """A backward that adds nothing to a summed gradient, since its parameter is frozen, leaves it as it is."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    replicas = ReplicaGroups({"weight": (0, 1)}, rank=rank)
    weight.grad = torch.full_like(weight, rank + 1.0)
    replicas.sum_gradients({"weight": weight})
    found = []
    for trained in (False, True):
        weight.requires_grad_(trained)
        replicas.unsum({"weight": weight})
        if trained:
            weight.grad += 10.0
        replicas.sum_gradients({"weight": weight})
        found.append(weight.grad[0].item())
    return found


def test_a_summed_gradient_stays_while_its_parameter_is_frozen():
    assert run_ranks(2, _frozen_for_a_while) == [[3.0, 23.0]] * 2


def test_gradients_on_one_rank_are_left_alone():
    assert _several_backwards(0, (0,)) == [1.0, 11.0, 105.5, 1.0, 1.0, 3.0]


def _counts_and_broadcast(rank):
    replicas = (
        ReplicaGroups({"bias": (0, 1, 2), "pair": (1, 2), "rest": (rank,)}, rank=rank)
        if rank
        else ReplicaGroups({"bias": (0, 1, 2), "rest": (rank,)}, rank=rank)
    )
    counts = {"bias": torch.tensor([rank, 2**40], dtype=torch.int64), "rest": torch.tensor([rank])}
    replicas.sum_tensors(counts)
    weights = {"bias": torch.full((2, 2), float(rank)).T, "rest": torch.tensor(rank)}
    if rank:
        weights["pair"] = torch.tensor([rank == 1])
    replicas.broadcast(weights)
    return {name: tensor.tolist() for name, tensor in counts.items()}, {n: t.tolist() for n, t in weights.items()}


def test_counts_are_summed_exactly_and_weights_come_from_the_first_holder():
    for rank, (counts, weights) in enumerate(run_ranks(3, _counts_and_broadcast)):
        assert counts == {"bias": [3, 3 * 2**40], "rest": [rank]}
        assert weights.pop("rest") == rank and weights.pop("bias") == [[0.0, 0.0]] * 2
        assert weights == ({"pair": [True]} if rank else {})


def _disagree(rank):
    try:
        ReplicaGroups({"a" if rank else "b": (0, 1)}, rank=rank)
    except AssertionError as error:
        return str(error)


def test_holders_that_mean_different_tensors_are_found_out_at_once():
    assert run_ranks(2, _disagree) == ["the ranks (0, 1) do not agree on which tensors they share"] * 2


def test_sparse_gradients_are_refused_by_name():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    replicas = ReplicaGroups({"table.weight": (0,)}, rank=0)
    try:
        replicas.sum_gradients({"table.weight": table.weight})
    except ConfigurationError as error:
        assert "table.weight is sparse; set sparse=False" in str(error)
    else:
        raise AssertionError("accepted")


def _summed_gradients_are_equal(rank):
    generator = torch.Generator().manual_seed(rank)
    weight = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    weight.grad = torch.randn(1000, generator=generator).bfloat16()
    ReplicaGroups({"weight": (0, 1, 2, 3)}, rank=rank).sum_gradients({"weight": weight})
    assert dist.get_world_size() == 4
    return weight.grad


def test_all_holders_get_the_same_bits():
    """Replicas would drift apart otherwise, however slowly."""
    first, *others = run_ranks(4, _summed_gradients_are_equal)
    assert all(torch.equal(first, other) for other in others)
