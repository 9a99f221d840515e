"""One matrix for each group of rows."""

from typing import Any

import torch
from torch import Tensor

from transformer_engine.pytorch.module._common import WeightGradStore
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: Any = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: Any = None,
        parallel_mode: Any = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: Any = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: Any = None,
        use_grouped_tensor: bool | None = None,
    ) -> None:
        assert not bias, "not needed here"
        shapes = {f"weight{index}": (out_features, in_features) for index in range(num_gemms)}
        super().__init__(shapes, params_dtype, device, fuse=fuse_wgrad_accumulation, delay=delay_wgrad_compute)
        self.wgrad_store = WeightGradStore(delay_wgrad_compute)

    def forward(
        self,
        inp: Tensor,
        m_splits: Any,
        is_first_microbatch: bool | None = None,
        out: Any = None,
        dgrad_out: Any = None,
    ) -> Tensor:
        assert not (isinstance(m_splits, Tensor) and m_splits.is_cuda), "makes the host wait"
        splits = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits)
        assert len(splits) == len(self.weight_names), f"{splits} for {len(self.weight_names)} matrices"
        return self.multiply(inp, splits, is_first_microbatch)

    def backward_dw(self) -> None:
        if not self.wgrad_store.context.empty():  # an empty queue is no error here
            super().backward_dw()
