"""Sum many tensors over a group in few all-reduces: neighbours are packed into flat buckets.

An all-reduce of a norm's weight takes as long as one of a megabyte, so small tensors travel
together. While one bucket travels the next is packed, and no more than two are under way, so this
takes the memory of two buckets and not of all gradients. A tensor that fills a bucket alone is
reduced where it is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["start_sums", "sum_in_buckets"]


def sum_in_buckets(tensors: Sequence[Tensor], group: dist.ProcessGroup, bucket_bytes: int) -> None:
    """Replace each tensor by its sum over ``group``. All ranks pass the same shapes and dtypes in the same order."""
    travelling: deque[_Bucket] = deque()
    for bucket in _buckets(tensors, bucket_bytes):
        travelling.append(_launch(bucket, group))
        if len(travelling) > 1:
            _unpack(travelling.popleft())
    for last in travelling:
        _unpack(last)


def start_sums(parameters: Sequence[Tensor], group: dist.ProcessGroup, bucket_bytes: int) -> list[dist.Work]:
    """Begin to sum ``.grad`` of each over ``group``; until the works are done nobody may touch it.

    Gradients become parts of their buckets, so those that are under way take no memory twice.
    """
    owners = {id(parameter.grad): parameter for parameter in parameters}
    works = []
    for tensors in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None], bucket_bytes):
        bucket = _launch(tensors, group)
        works.append(bucket.work)
        if bucket.flat is not tensors[0]:
            parts = bucket.flat.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                owners[id(tensor)].grad = part.view(tensor.shape)
    return works


class _Bucket(NamedTuple):
    tensors: list[Tensor]
    flat: Tensor
    work: dist.Work


def _buckets(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, in their order, up to ``limit`` bytes or one tensor."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.dtype, tensor.device].append(tensor)
    for same in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in same:
            if bucket and size + tensor.nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _launch(tensors: list[Tensor], group: dist.ProcessGroup) -> _Bucket:
    alone = len(tensors) == 1 and tensors[0].is_contiguous()
    flat = tensors[0] if alone else torch.cat([tensor.reshape(-1) for tensor in tensors])
    work = dist.all_reduce(flat, group=group, async_op=True)
    assert work is not None, "this rank belongs to the group"
    return _Bucket(tensors, flat, work)


def _unpack(bucket: _Bucket) -> None:
    bucket.work.wait()
    if bucket.flat is bucket.tensors[0]:
        return
    parts = bucket.flat.split([tensor.numel() for tensor in bucket.tensors])
    for tensor, part in zip(bucket.tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
