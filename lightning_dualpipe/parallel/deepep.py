"""DeepEP, DeepSeek's library for exactly this traffic on NVLink and RDMA, if it is installed.

    deep_ep.ElasticBuffer    version 2: over NCCL >= 2.30.4, any group
    deep_ep.Buffer           version 1: on NVLink within a node; between nodes of 8 GPUs over NVSHMEM

Both send each token once to every rank that wants it, and between nodes once to every node, and return a handle
with which ``combine`` finds the way home. The backward of a dispatch is a combine with its handle, and the other
way round. It has a stream of its own, which waits for ours when a call is made; an event tells when it is done.

This is the only file that knows the library, and it imports it where it is used.

Rows in a ``row_format`` are a pair for it: values of a byte, and a float32 for each tile, which it passes on.

Shapes: N tokens here, C copies that came here, K experts chosen per token, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Flight, Values
from lightning_dualpipe.parallel.dispatch import Routing, experts_per_rank
from lightning_dualpipe.parallel.flight import used_here
from lightning_dualpipe.parallel.row_format import RowFormat
from lightning_dualpipe.parallel.token_copies import CopyDispatcher, CopyRouting, Landed

__all__ = ["DeepEPBuffers", "DeepEPDispatcher", "why_not_deepep"]


def why_not_deepep(device: torch.device, dtype: torch.dtype, *, num_ranks: int, num_nodes: int | None) -> str | None:
    """What stands against it here, with what would help; None if nothing does."""
    if device.type != "cuda":
        return f"DeepEP needs CUDA devices, and this run computes on {device.type}"
    if find_spec("deep_ep") is None:
        return "DeepEP is not installed (no package deep_ep; see github.com/deepseek-ai/DeepEP)"
    if dtype != torch.bfloat16:
        return f"DeepEP sends bfloat16, and this run computes in {dtype}; use precision='bf16-true'"
    try:
        import deep_ep

        if "ElasticBuffer" in vars(deep_ep):
            return None
        for config in (deep_ep.Buffer.get_dispatch_config(num_ranks), deep_ep.Buffer.get_combine_config(num_ranks)):
            config.get_nvl_buffer_size_hint(_ANY_WIDTH, num_ranks)
            config.get_rdma_buffer_size_hint(_ANY_WIDTH, num_ranks)
    except Exception as error:  # it compares NCCL libraries and builds kernels: whatever goes wrong is a reason
        return f"DeepEP cannot be used here: {type(error).__name__}: {error}"
    if num_nodes != max(num_ranks // _V1_RANKS_PER_NODE, 1):
        return (
            f"DeepEP 1 takes groups of up to {_V1_RANKS_PER_NODE} ranks on one node, or {_V1_RANKS_PER_NODE} on each; "
            f"this one has {num_ranks} ranks on {num_nodes or 'uneven'} nodes; install DeepEP 2"
        )
    return None


_ANY_WIDTH = 1024
_V1_RANKS_PER_NODE = 8


class DeepEPDispatcher(CopyDispatcher):
    """Rank r of the group holds the experts ``[r * num_local_experts, (r + 1) * num_local_experts)``."""

    def __init__(self, num_experts: int, buffers: DeepEPBuffers) -> None:
        self.num_local_experts = experts_per_rank(num_experts, buffers.group)
        self.first_local_expert = buffers.group.rank() * self.num_local_experts
        self._num_experts, self._buffers = num_experts, buffers

    def send(self, rows: Tensor, weights: Tensor, plan: Tensor) -> Flight:
        if rows.dtype != torch.bfloat16:
            raise ConfigurationError(
                f"DeepEP sends bfloat16, and a layer of this model gave it {rows.dtype}; use precision='bf16-true', "
                "or dispatcher='node'"
            )
        if self.row_format is not None and rows.shape[1] % 16:
            raise ConfigurationError(
                f"DeepEP sends FP8 rows in pieces of 16 bytes, and rows of this model have {rows.shape[1]}; use a "
                "hidden_size that is a multiple of 16, dispatcher='node', or send tokens in bf16"
            )
        buffer = self._buffers.holding(rows, num_topk=plan.shape[1])
        leaving = _leaving(rows, self.row_format)
        sent = buffer.dispatch(leaving, weights.float().contiguous(), plan.contiguous(), self._num_experts)
        return _Dispatch(buffer, sent, (rows, leaving, weights, plan), weights.dtype, self.row_format)

    def send_back(self, rows: Tensor, routing: Routing) -> Flight:
        assert isinstance(routing, CopyRouting), "a routing belongs to the dispatcher that made it"
        buffer, handle = routing.journey
        return _Combine.launch(buffer, handle, rows, None, routing, self.row_format)


_Rows = Tensor | tuple[Tensor, Tensor]
"""As they travel: [N, D] in bfloat16, or values [N, D] in FP8 and scales [N, T] in float32."""


def _leaving(rows: Tensor, row_format: RowFormat | None) -> _Rows:
    return rows.contiguous() if row_format is None else row_format.encode(rows)


def _arrived(rows: _Rows, row_format: RowFormat | None) -> Tensor:
    if isinstance(rows, Tensor):
        used_here(rows)
        return rows
    assert row_format is not None, "what was sent in FP8 arrives so, and nothing else"
    used_here(*rows)
    return row_format.decode(*rows, torch.bfloat16)


class DeepEPBuffers:
    """The communication buffer of an expert group, for the dispatchers of all layers; it grows as needed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._buffer: _Buffer | None = None

    def holding(self, x_ND: Tensor, *, num_topk: int) -> _Buffer:
        """All ranks call it together, with as many tokens as each has. Makes the host wait, as a dispatch does."""
        import deep_ep

        most = torch.tensor(len(x_ND), device=x_ND.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        needed = _Needed(int(most), x_ND.shape[1], num_topk)
        if self._buffer is None or not self._buffer.holds(needed):
            new = _Elastic if "ElasticBuffer" in vars(deep_ep) else _Legacy
            self._buffer = new(self.group, needed)
        return self._buffer


class _Needed(NamedTuple):
    num_tokens: int  # of the rank that has most
    width: int
    num_topk: int


class _Sent(NamedTuple):
    x_CD: _Rows
    experts_CK: Tensor  # local indices, -1 elsewhere
    weights_CK: Tensor
    num_rows: int
    handle: Any
    event: Any


class _Buffer(ABC):
    """One version of the library. All calls return at once but ``dispatch``, which waits for counts."""

    @abstractmethod
    def holds(self, needed: _Needed) -> bool: ...

    @abstractmethod
    def dispatch(self, x_ND: _Rows, weights_NK: Tensor, experts_NK: Tensor, num_experts: int) -> _Sent: ...

    @abstractmethod
    def dispatch_again(self, x_ND: _Rows, handle: Any) -> tuple[_Rows, Any]:
        """``(x_CD, event)``."""

    @abstractmethod
    def combine(self, x_CD: Tensor, weights_CK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None, Any]:
        """``(x_ND, weights_NK, event)``."""


class _Elastic(_Buffer):
    def __init__(self, group: dist.ProcessGroup, needed: _Needed) -> None:
        import deep_ep

        num_tokens = -(-max(needed.num_tokens, 1) // _TOKENS) * _TOKENS
        self._holds = _Needed(num_tokens, needed.width, needed.num_topk)
        self._index_dtype = deep_ep.topk_idx_t
        self._buffer = deep_ep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=num_tokens,
            hidden=needed.width,
            num_topk=needed.num_topk,
            deterministic=True,  # tokens in the order of (rank, token), not as they happen to arrive
        )

    def holds(self, needed: _Needed) -> bool:
        return all(has >= wants for has, wants in zip(self._holds, needed, strict=True))

    def dispatch(self, x_ND: _Rows, weights_NK: Tensor, experts_NK: Tensor, num_experts: int) -> _Sent:
        x_CD, experts_CK, weights_CK, handle, event = self._buffer.dispatch(
            x_ND,
            topk_idx=experts_NK.to(self._index_dtype),
            topk_weights=weights_NK,
            num_experts=num_experts,
            async_with_compute_stream=True,
        )
        return _Sent(x_CD, experts_CK, weights_CK, sum(handle.num_recv_tokens_per_expert_list), handle, event)

    def dispatch_again(self, x_ND: _Rows, handle: Any) -> tuple[_Rows, Any]:
        # without num_sms it would ask how many suit num_experts, which is not given a second time
        x_CD, _, _, _, event = self._buffer.dispatch(
            x_ND, handle=handle, num_sms=handle.num_sms, async_with_compute_stream=True
        )
        return x_CD, event

    def combine(self, x_CD: Tensor, weights_CK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None, Any]:
        combined: tuple[Tensor, Tensor | None, Any] = self._buffer.combine(
            x_CD, handle=handle, topk_weights=weights_CK, async_with_compute_stream=True
        )
        return combined


class _Legacy(_Buffer):
    def __init__(self, group: dist.ProcessGroup, needed: _Needed) -> None:
        from deep_ep import Buffer

        self._width = needed.width
        configs = (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size()))
        size = (needed.width * 2, group.size())
        self._buffer = Buffer(
            group,
            max(config.get_nvl_buffer_size_hint(*size) for config in configs),
            max(config.get_rdma_buffer_size_hint(*size) for config in configs),
        )

    def holds(self, needed: _Needed) -> bool:
        return self._width >= needed.width  # tokens pass through in chunks, however many there are

    def dispatch(self, x_ND: _Rows, weights_NK: Tensor, experts_NK: Tensor, num_experts: int) -> _Sent:
        per_rank, per_rdma_rank, per_expert, in_rank, layout_done = self._buffer.get_dispatch_layout(
            experts_NK, num_experts, async_finish=True
        )
        x_CD, experts_CK, weights_CK, rows_E, handle, event = self._buffer.dispatch(
            x_ND,
            topk_idx=experts_NK,
            topk_weights=weights_NK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=layout_done,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        return _Sent(x_CD, experts_CK, weights_CK, sum(rows_E), handle, event)

    def dispatch_again(self, x_ND: _Rows, handle: Any) -> tuple[_Rows, Any]:
        x_CD, _, _, _, _, event = self._buffer.dispatch(x_ND, handle=handle, async_finish=True)
        return x_CD, event

    def combine(self, x_CD: Tensor, weights_CK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None, Any]:
        combined: tuple[Tensor, Tensor | None, Any] = self._buffer.combine(
            x_CD, handle, topk_weights=weights_CK, async_finish=True
        )
        return combined


_TOKENS = 128  # sizes are rounded up to it, so that a somewhat longer microbatch needs no new buffer


@dataclass(slots=True, eq=False)
class _Dispatch:
    """An ``interface.Flight``, as all below."""

    buffer: _Buffer
    sent: _Sent | None
    leaving: Values  # must live until they have left
    weights_dtype: torch.dtype
    row_format: RowFormat | None
    handle: Any = None

    def land(self) -> Values:
        assert self.sent is not None, "a flight lands once"
        x_CD, experts_CK, weights_CK, num_rows, self.handle, event = self.sent
        event.current_stream_wait()
        used_here(experts_CK, weights_CK)
        self.leaving, self.sent = (), None
        landed = Landed(experts_CK.to(torch.int64), 0, 1, num_rows, (self.buffer, self.handle))
        return _arrived(x_CD, self.row_format), weights_CK.to(self.weights_dtype), landed

    def back(self, gradients: Values) -> Flight:
        grad_CD, grad_CK, _ = gradients
        return _Combine.launch(self.buffer, self.handle, grad_CD, grad_CK, None)


@dataclass(slots=True, eq=False)
class _Combine:
    """Lands the sums of rows, those of weights if there are any, and ``routing``."""

    buffer: _Buffer
    handle: Any
    leaving: Values
    arriving: Values
    event: Any
    routing: Routing | None
    row_format: RowFormat | None  # of its gradients; where it is the way of gradients, of what lands
    weights_dtype: torch.dtype | None = None

    @classmethod
    def launch(
        cls,
        buffer: _Buffer,
        handle: Any,
        x_CD: Tensor,
        weights_CK: Tensor | None,
        routing: Routing | None,
        row_format: RowFormat | None = None,
    ) -> _Combine:
        given = None if weights_CK is None else weights_CK.float().contiguous()
        x_ND, weights_NK, event = buffer.combine(x_CD.contiguous(), given, handle)
        arriving = (x_ND,) if weights_CK is None else (x_ND, weights_NK)
        weights_dtype = None if weights_CK is None else weights_CK.dtype
        return cls(buffer, handle, (x_CD, given), arriving, event, routing, row_format, weights_dtype)

    def land(self) -> Values:
        self.event.current_stream_wait()
        x, *weights = self.arriving
        used_here(*weights)
        self.leaving, self.arriving = (), ()
        return _arrived(x, self.row_format), *(each.to(self.weights_dtype) for each in weights), self.routing

    def back(self, gradients: Values) -> Flight:
        leaving = _leaving(gradients[0], self.row_format)
        x_CD, event = self.buffer.dispatch_again(leaving, self.handle)
        return _Combine(self.buffer, self.handle, (gradients[0], leaving), (x_CD,), event, None, self.row_format)
