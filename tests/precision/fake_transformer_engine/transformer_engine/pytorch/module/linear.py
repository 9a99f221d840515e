"""One matrix."""

from typing import Any

from torch import Tensor

from transformer_engine.pytorch.module._common import WeightGradStore
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
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
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: Any = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: Any = None,
        save_original_input: bool = False,
        name: Any = None,
    ) -> None:
        assert not bias, "not needed here"
        shapes = {"weight": (out_features, in_features)}
        super().__init__(shapes, params_dtype, device, fuse=fuse_wgrad_accumulation, delay=delay_wgrad_compute)
        self.wgrad_store = WeightGradStore(delay_wgrad_compute, ub_bulk_wgrad)

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor:
        return self.multiply(inp, [len(inp)], is_first_microbatch)
