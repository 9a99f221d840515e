"""What DeepEP 2.1.0's two classes promise, with their signatures, on the CPU, for ``sys.modules["deep_ep"]``.

Everything is sent to everybody, and each picks what is its own. What a call returns holds nonsense until its
event has been waited for, so that whoever reads too early shows.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist

topk_idx_t = torch.int64


class Event:
    def __init__(self):
        self.late = []

    def fill_late(self, tensor):
        """``tensor`` gets its values when this event is waited for."""
        if tensor is None:
            return None
        if isinstance(tensor, tuple):
            return tuple(map(self.fill_late, tensor))
        empty = torch.full_like(tensor, -7)
        self.late.append((empty, tensor))
        return empty

    def current_stream_wait(self, release_handle=False):
        for empty, tensor in self.late:
            empty.copy_(tensor)
        self.late = []


def _everybodys(group, *values):
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, values, group=group)
    return gathered


def _check(x, dtype, dim=2):
    assert x.dtype == dtype and x.dim() == dim and x.is_contiguous()


def _check_rows(x):
    """In bfloat16, or in FP8 with scales; both versions send pieces of 16 bytes."""
    if isinstance(x, tuple):
        values, scales = x
        _check(values, torch.float8_e4m3fn)
        assert scales.dtype == torch.float32 and len(scales) == len(values), "packed UE8M0 would do as well"
    else:
        values = x
        _check(values, torch.bfloat16)
    assert values.shape[1] * values.element_size() % 16 == 0


def _parts(x):
    """FP8 as bytes: nobody pickles it."""
    return (x[0].view(torch.uint8), x[1]) if isinstance(x, tuple) else (x,)


def _whole(parts):
    return parts[0] if len(parts) == 1 else (parts[0].view(torch.float8_e4m3fn), parts[1])


class _Exchange:
    def __init__(self, group, *, hidden=None):
        self.group = group
        self.calls = []

    def _arrive(self, x, experts, weights, num_experts):
        _check_rows(x)
        _check(experts, torch.int64)
        _check(weights, torch.float32)
        local = num_experts // self.group.size()
        first = self.group.rank() * local
        xs, indices, ws, came = [[] for _ in _parts(x)], [], [], []
        for source, (x_s, experts_s, weights_s) in enumerate(_everybodys(self.group, _parts(x), experts, weights)):
            mine = (experts_s >= first) & (experts_s < first + local)
            tokens = mine.any(1).nonzero().flatten()
            for part, rows in zip(x_s, xs, strict=True):
                rows.append(part[tokens])
            indices.append(torch.where(mine, experts_s - first, -1)[tokens])
            ws.append(weights_s[tokens])  # also of experts elsewhere
            came += [(source, int(token)) for token in tokens]
        index = torch.cat(indices)
        counts = [int((index == expert).sum()) for expert in range(local)]
        handle = SimpleNamespace(came=came, num_tokens=len(_parts(x)[0]))
        return _whole([torch.cat(rows) for rows in xs]), index, torch.cat(ws), counts, handle

    def _arrive_again(self, x, handle):
        _check_rows(x)
        everybodys = [parts for (parts,) in _everybodys(self.group, _parts(x))]
        arrived = []
        for index, part in enumerate(_parts(x)):
            rows = [everybodys[source][index][token] for source, token in handle.came]
            arrived.append(torch.stack(rows) if rows else part.new_empty(0, part.shape[1]))
        return _whole(arrived)

    def _home(self, x, weights, handle):
        _check(x, torch.bfloat16)
        assert len(x) == len(handle.came)
        sums = torch.zeros(handle.num_tokens, x.shape[1])
        sums_of_weights = None
        if weights is not None:
            _check(weights, torch.float32)
            sums_of_weights = torch.zeros(handle.num_tokens, weights.shape[1])
        for x_s, weights_s, came in _everybodys(self.group, x, weights, handle.came):
            for row, (source, token) in enumerate(came):
                if source == self.group.rank():
                    sums[token] += x_s[row].float()
                    if weights is not None:
                        sums_of_weights[token] += weights_s[row]
        return sums.bfloat16(), sums_of_weights


class Buffer(_Exchange):
    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        super().__init__(group)
        assert num_nvl_bytes > 0 and num_rdma_bytes == 0, "on one node"

    @staticmethod
    def get_dispatch_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, num_ranks: 128 * hidden_bytes * num_ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, num_ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        rank = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // self.group.size()))
        in_rank = torch.stack([(rank == peer).any(1) for peer in range(self.group.size())], dim=1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, Event()

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        assert previous_event is None or (async_finish and allocate_on_comm_stream)
        event = Event()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return event.fill_late(self._arrive_again(x, handle[0])), None, None, None, None, event
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert len(is_token_in_rank) == len(_parts(x)[0])
        x, index, weights, counts, handle = self._arrive(x, topk_idx, topk_weights, len(num_tokens_per_expert))
        late = map(event.fill_late, (x, index, weights))
        return *late, counts, (handle, "five more tensors"), event

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        event = Event()
        x, weights = self._home(x, topk_weights, handle[0])
        return event.fill_late(x), event.fill_late(weights), event


class ElasticBuffer(_Exchange):
    made = 0

    def __init__(
        self,
        group,
        num_bytes=None,
        num_cpu_bytes=0,
        num_max_tokens_per_rank=0,
        hidden=0,
        num_topk=0,
        use_fp8_dispatch=False,
        deterministic=False,
    ):
        super().__init__(group)
        assert num_max_tokens_per_rank > 0 and hidden > 0
        assert len(set(_everybodys(group, num_max_tokens_per_rank))) == 1, "ranks disagree"
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        ElasticBuffer.made += 1

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        cumulative_local_expert_recv_stats=None,
        num_experts=None,
        num_max_tokens_per_rank=None,
        expert_alignment=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
        handle=None,
    ):
        assert len(_parts(x)[0]) <= self.num_max_tokens_per_rank
        assert num_sms or num_experts, "it asks get_theoretical_num_sms, which takes the number of experts"
        event = Event()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return event.fill_late(self._arrive_again(x, handle)), None, None, handle, event
        x, index, weights, counts, handle = self._arrive(x, topk_idx, topk_weights, num_experts)
        handle.num_recv_tokens_per_expert_list, handle.num_sms = counts, 20
        return *map(event.fill_late, (x, index, weights)), handle, event

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
    ):
        event = Event()
        x, weights = self._home(x, topk_weights, handle)
        return event.fill_late(x), event.fill_late(weights), event
