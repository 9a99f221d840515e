"""What every tensor of the model is called in a Hugging Face directory, and which part of ours it is.

    ours                                           Hugging Face
    embed_tokens.weight                            model.embed_tokens.weight
    norm.weight                                    model.norm.weight
    lm_head.weight                                 lm_head.weight                      (absent when tied)
    blocks.N.*                                     model.layers.N.*
    blocks.N.mlp.experts.gate_up_proj[e, :I]       model.layers.N.mlp.experts.e.gate_proj.weight
    blocks.N.mlp.experts.gate_up_proj[e, I:]       model.layers.N.mlp.experts.e.up_proj.weight
    blocks.N.mlp.experts.down_proj[e]              model.layers.N.mlp.experts.e.down_proj.weight
    mtp.K.{enorm,hnorm,eh_proj}.weight             model.layers.(L+K).{enorm,hnorm,eh_proj}.weight
    mtp.K.norm.weight                              model.layers.(L+K).shared_head.norm.weight
    mtp.K.block.*                                  model.layers.(L+K).*
    embed_tokens.weight again, a copy              model.layers.(L+K).embed_tokens.weight
    lm_head.weight again, a copy                   model.layers.(L+K).shared_head.head.weight

N counts decoder layers, K depths of multi-token prediction, e the experts of the whole model; L is
the number of decoder layers and I the width of an expert. The right column is what DeepSeek
published; transformers reads and writes its first L layers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.deepseek_v3.model import Transformer

__all__ = [
    "Part",
    "copies",
    "is_router_bias",
    "key_of",
    "mtp_projection",
    "parts_of",
    "pieces",
    "shapes_by_key",
    "shapes_without_numbers",
]

_GATE_UP = ".mlp.experts.gate_up_proj"
_DOWN = ".mlp.experts.down_proj"
_ROUTER_BIAS = ".mlp.gate.e_score_correction_bias"
_BLOCK = re.compile(r"^blocks\.")
_MTP = re.compile(r"mtp\.(\d+)\.(?:(block)\.)?(.+)")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A tensor under our name; of a stack of experts perhaps only the rows from ``first_expert`` on."""

    name: str
    tensor: Tensor
    first_expert: int = 0


def parts_of(model: nn.Module) -> Iterator[Part]:
    """Everything in ``model`` that files hold, whether it is whole or what one rank keeps of it."""
    first_expert = {path: module.first_expert for path, module in model.named_modules() if isinstance(module, Experts)}
    biases = (named for named in model.named_buffers() if is_router_bias(named[0]))
    for name, tensor in chain(model.named_parameters(), biases):
        yield Part(name, tensor, first_expert.get(name.rpartition(".")[0], 0))


def pieces(part: Part, config: DeepSeekV3Config) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face directory that ``part`` is made of, as views of it."""
    key = key_of(part.name, config)
    width = config.moe_intermediate_size
    if part.name.endswith(_GATE_UP):
        folder = key.removesuffix("gate_up_proj")
        for expert, gate_up in enumerate(part.tensor, part.first_expert):
            yield f"{folder}{expert}.gate_proj.weight", gate_up[:width]
            yield f"{folder}{expert}.up_proj.weight", gate_up[width:]
    elif part.name.endswith(_DOWN):
        folder = key.removesuffix("down_proj")
        for expert, down in enumerate(part.tensor, part.first_expert):
            yield f"{folder}{expert}.down_proj.weight", down
    else:
        yield key, part.tensor


def key_of(name: str, config: DeepSeekV3Config) -> str:
    """The key of our tensor ``name``; of a stack of experts what its keys begin with."""
    if name == "lm_head.weight":
        return "model.embed_tokens.weight" if config.tie_word_embeddings else name
    mtp = _MTP.fullmatch(name)
    if mtp is None:
        return f"model.{_BLOCK.sub('layers.', name)}"
    depth, in_block, rest = mtp.groups()
    if not in_block and rest == "norm.weight":
        rest = "shared_head.norm.weight"
    return f"model.layers.{config.num_hidden_layers + int(depth)}.{rest}"


def copies(name: str, config: DeepSeekV3Config) -> Iterator[str]:
    """The keys under which files repeat our tensor ``name``, once per depth of multi-token prediction."""
    for depth in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + depth
        if name == "embed_tokens.weight":
            yield f"model.layers.{layer}.embed_tokens.weight"
        if name == ("embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"):
            yield f"model.layers.{layer}.shared_head.head.weight"


def mtp_projection(layer: int) -> str:
    """The key whose presence says that ``layer`` of a file is a multi-token prediction layer."""
    return f"model.layers.{layer}.eh_proj.weight"


def is_router_bias(name: str) -> bool:
    """Whether this tensor, by our name or the file's, is float32 whatever the others are."""
    return name.endswith(_ROUTER_BIAS)


def shapes_by_key(config: DeepSeekV3Config) -> dict[str, tuple[int, ...]]:
    """All that a directory of the whole model holds, copies apart. Allocates nothing."""
    with torch.device("meta"), torch.no_grad():
        model = Transformer(config)
        return {key: tuple(tensor.shape) for part in parts_of(model) for key, tensor in pieces(part, config)}


def shapes_without_numbers(config: DeepSeekV3Config) -> dict[str, tuple[int, ...]]:
    """Shared experts of width 0: the model has none, transformers has them and asks for their keys."""
    shapes: dict[str, tuple[int, ...]] = {}
    if not config.n_shared_experts:
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers):
            folder = f"model.layers.{layer}.mlp.shared_experts"
            inwards = (f"{folder}.gate_proj.weight", f"{folder}.up_proj.weight")
            shapes |= dict.fromkeys(inwards, (0, config.hidden_size))
            shapes[f"{folder}.down_proj.weight"] = (config.hidden_size, 0)
    return shapes
