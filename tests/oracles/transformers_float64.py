"""DeepSeek-V3 of transformers, computed in float64 throughout.

transformers takes norms, router, softmax and rotary angles in float32 whatever the model's dtype
is, which hides differences below 1e-6 and can turn a choice of experts. Inside ``in_float64`` the
files that hold the model see float64 where they ask for float32; nothing else about it changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3

__all__ = ["in_float64", "load_reference", "logits_and_experts", "new_reference"]


class _Torch64:
    """torch, as a module in which float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64() -> Iterator[None]:
    with (
        patch.object(modeling_deepseek_v3, "torch", _Torch64()),
        patch.object(modeling_rope_utils, "torch", _Torch64()),
    ):
        yield


def new_reference(**settings: Any) -> DeepseekV3ForCausalLM:
    """A model of these ``config.json`` settings with random weights, norms and biases included."""
    config = DeepseekV3Config(**settings, experts_implementation="eager", attn_implementation="eager")
    with in_float64():
        model = DeepseekV3ForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("inv_freq"):
                continue
            if name.endswith("norm.weight"):
                tensor.normal_(1, 0.2)
            else:
                tensor.normal_(0, 0.3 if name.endswith("bias") else 1.5 * max(tensor.shape[-1], 1) ** -0.5)
            tensor.copy_(tensor.float())  # e_score_correction_bias is kept in float32 files
    return model


def load_reference(directory: Path) -> tuple[DeepseekV3ForCausalLM, dict[str, Any]]:
    """The model in ``directory`` as transformers loads it, and what transformers says about its keys."""
    with in_float64():
        model, info = DeepseekV3ForCausalLM.from_pretrained(
            directory,
            dtype=torch.float64,
            experts_implementation="eager",
            attn_implementation="eager",
            output_loading_info=True,
        )
    return model.double().eval(), info


def logits_and_experts(model: DeepseekV3ForCausalLM, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, T, V] and per MoE layer the experts of each token [N, K] in ascending order."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: chosen.append(output[2].sort().values))
        for module in model.modules()
        if isinstance(module, modeling_deepseek_v3.DeepseekV3TopkRouter)
    ]
    with in_float64(), torch.no_grad():
        logits = model(input_ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, chosen
