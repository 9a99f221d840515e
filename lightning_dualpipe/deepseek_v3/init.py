"""Initial weights as a function of (seed, parameter name, expert), and of nothing else.

Every matrix is N(0, std), norms are 1, biases 0 (technical report, section 4.2). Each parameter, and
each expert of a stack, has a random stream of its own, so a rank that holds a part of the model holds
what one process would have there. Numbers are drawn in float32 on the parameter's device and then
rounded: precisions agree, CPU and CUDA do not.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lightning_dualpipe.deepseek_v3.experts import Experts
from lightning_dualpipe.deepseek_v3.norm import RMSNorm
from lightning_dualpipe.deepseek_v3.router import Router

__all__ = ["initialize"]


@torch.no_grad()
def initialize(model: nn.Module, *, seed: int, std: float) -> None:
    """Fill the parameters of ``model``, named from it, and the routers' biases."""
    done: set[Tensor] = set()  # tied weights have several names; the first one counts
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter not in done:
                done.add(parameter)
                _fill(module, name, parameter, seed=seed, std=std)
        if isinstance(module, Router):
            module.e_score_correction_bias.zero_()


def _fill(module: nn.Module, name: str, parameter: Tensor, *, seed: int, std: float) -> None:
    if isinstance(module, RMSNorm):
        parameter.fill_(1)
    elif name.endswith(".bias"):
        parameter.zero_()
    elif isinstance(module, Experts):
        for expert, row in enumerate(parameter, start=module.first_expert):
            _draw(row, f"{name}[{expert}]", seed=seed, std=std)
    else:
        _draw(parameter, name, seed=seed, std=std)


def _draw(target: Tensor, name: str, *, seed: int, std: float) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(target.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
    numbers = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    target.copy_(numbers.normal_(0, std, generator=generator))
