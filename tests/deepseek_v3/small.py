"""A model small enough for the slow definitions, with every part of the large one and random weights."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config, YarnConfig
from lightning_dualpipe.deepseek_v3.model import Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "n_shared_experts": 2,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "max_position_embeddings": 64,
    "rope_scaling": YarnConfig(factor=4, original_max_position_embeddings=16, mscale=0.8, mscale_all_dim=1.2),
    "num_nextn_predict_layers": 2,
    "aux_loss_alpha": 0.05,
    "rms_norm_eps": 1e-5,
}


def small_config(**overrides: Any) -> DeepSeekV3Config:
    return DeepSeekV3Config(**{**SMALL, **overrides})


def randomize(module: nn.Module, seed: int = 1) -> nn.Module:
    """Float64, every parameter and router bias random and of a size that matters."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("norm.weight"):
                tensor.normal_(1, 0.3, generator=generator)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.2, generator=generator)
            else:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5, generator=generator)
    return module


def random_model(config: DeepSeekV3Config) -> Transformer:
    model = randomize(Transformer(config))
    assert isinstance(model, Transformer)
    return model


def random_batch(config: DeepSeekV3Config, *shape: int, ignored: int = 0) -> dict[str, Tensor]:
    tokens = torch.randint(config.vocab_size, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].clone()
    labels.flatten()[:ignored] = -100
    return {"input_ids": tokens[:, :-1], "labels": labels}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies for an oracle; floating-point ones may be differentiated by."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in module.state_dict().items()}
