"""The one rule of gradient synchronisation: a parameter's gradient is summed over every rank that holds it.

Losses are sums over tokens divided by the number of tokens of the whole step, so gradients of
different tokens just add up; whether they met the parameter on another data rank, in the other
direction of a bidirectional pipeline, or, for an expert, in another expert group makes no
difference. Who holds a parameter is all there is to know:

    dense parameter of a stage      the data ranks at every pipeline rank that the stage is placed on
    expert                          of those, the ranks with the same expert rank
    embedding tied to the head      the holders of either

Tensors of the same holders travel together in flat buckets. All ranks go through their groups in
the same order of holders, and through each group in the order of names, so nobody waits in a circle.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.buckets import sum_in_buckets
from lightning_dualpipe.parallel.groups import create_groups

__all__ = ["ReplicaGroups"]

Holders = tuple[int, ...]


class ReplicaGroups:
    """Talks to the other holders of what this rank holds.

    Args:
        holders: for the global name of each parameter (or other tensor) of this rank, the global
            ranks that hold it, this one included. A tied parameter goes by one name everywhere.
        rank: this rank.

    All ranks of the world create it together. The holders of a tensor call each method equally
    often, with the same names.
    """

    def __init__(
        self,
        holders: Mapping[str, Sequence[int]],
        *,
        rank: int,
        timeout: timedelta | None = None,
        bucket_bytes: int = 25 * 2**20,
    ) -> None:
        self._holders = {name: tuple(sorted(set(ranks))) for name, ranks in sorted(holders.items())}
        foreign = [name for name, ranks in self._holders.items() if rank not in ranks]
        assert not foreign, f"rank {rank} holds {foreign}, but is not among their holders"
        self.bucket_bytes = bucket_bytes
        self._summed: dict[str, weakref.ref[Tensor]] = {}
        self._groups: dict[Holders, dist.ProcessGroup] = {}
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._groups = create_groups(self._agree(), what="replicas", timeout=timeout)

    def num_holders(self, name: str) -> int:
        return len(self._holders[name])

    @torch.no_grad()
    def sum_gradients(self, parameters: Mapping[str, Tensor], *, frozen: Collection[str] = ()) -> None:
        """Replace ``.grad`` of each parameter by its sum over the holders, in place.

        Of parameters that require no gradient, those that are named ``frozen``. A missing gradient counts as
        zeros; if all holders miss it, it stays missing, so that an optimizer skips the parameter as it would
        on one rank. Only a rank that misses one has to look, and so to wait for the device.
        """
        trained = {name: each for name, each in parameters.items() if each.requires_grad or name in frozen}
        self.refuse_sparse(trained)
        for group, names in self.by_group(trained):
            missing = [index for index, name in enumerate(names) if trained[name].grad is None]
            present = torch.ones(len(names), device=trained[names[0]].device)
            for index in missing:
                present[index] = 0
                trained[names[index]].grad = _zeros(trained[names[index]])
            dist.all_reduce(present, group=group)
            sum_in_buckets([_gradient(trained[name]) for name in names], group, self.bucket_bytes)
            for index in missing:
                if not present[index]:
                    trained[names[index]].grad = None
        self.note_summed(trained)

    def note_summed(self, parameters: Mapping[str, Tensor]) -> None:
        """The gradients are sums over the holders."""
        self._summed |= {name: weakref.ref(p.grad) for name, p in parameters.items() if p.grad is not None}

    @torch.no_grad()
    def unsum(self, parameters: Mapping[str, Tensor]) -> None:
        """Call before a backward: divides by the number of holders what it would add to a summed gradient.

        S on each of n holders is what S / n on each would sum to, so the next ``sum_gradients`` gives
        S plus the sum of what was added, and not n S. Gradients that have come anew are left alone, and so
        are those of parameters that are frozen for now (``toggle_optimizer``): nothing is added to them.
        """
        for name in [name for name in self._summed if name in parameters and parameters[name].requires_grad]:
            summed, gradient = self._summed.pop(name)(), parameters[name].grad
            if gradient is not None and summed is gradient:
                gradient /= self.num_holders(name)

    @torch.no_grad()
    def sum_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sum each tensor, for instance a count of tokens, over the holders of its name, in place."""
        for group, names in self.by_group(tensors):
            sum_in_buckets([tensors[name] for name in names], group, self.bucket_bytes)

    @torch.no_grad()
    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every holder of each tensor the values of the first one, in place."""
        for group, names in self.by_group(tensors):
            for name in names:
                values = tensors[name].contiguous()
                dist.broadcast(values, group=group, group_src=0)
                tensors[name].copy_(values)

    def by_group(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[dist.ProcessGroup, list[str]]]:
        """The groups in their common order, each with those of the names that it shares, in order."""
        for holders, group in sorted(self._groups.items(), key=lambda item: item[0]):
            if names := [name for name, ranks in self._holders.items() if ranks == holders and name in tensors]:
                yield group, names

    @staticmethod
    def refuse_sparse(parameters: Mapping[str, Tensor]) -> None:
        sparse = [name for name, each in parameters.items() if each.grad is not None and each.grad.is_sparse]
        if sparse:
            raise ConfigurationError.of(
                "gradients are summed over ranks as dense tensors",
                [f"{name} is sparse; set sparse=False" for name in sparse],
            )

    def _agree(self) -> list[Holders]:
        """Every set of holders in the world, in one order; and that all holders mean the same names."""
        names: dict[Holders, list[str]] = defaultdict(list)
        for name, ranks in self._holders.items():
            names[ranks].append(name)
        mine = {ranks: hashlib.sha256("\n".join(each).encode()).hexdigest() for ranks, each in names.items()}
        theirs: list[dict[Holders, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(theirs, mine)
        everything = sorted({ranks for each in theirs for ranks in each})
        for ranks in everything:
            digests = {theirs[rank].get(ranks) for rank in ranks}
            assert len(digests) == 1, f"the ranks {ranks} do not agree on which tensors they share"
        return everything


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=parameter.grad_dtype)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
