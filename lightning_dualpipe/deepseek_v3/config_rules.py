"""What a DeepSeek-V3 configuration must satisfy, each rule with the remedy.

Types come first: rules about sizes that are not numbers would only confuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config, YarnConfig

__all__ = ["model_problems", "yarn_problems"]

_COUNTS = {  # integer fields and the least they may be
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "n_shared_experts": 0,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 1,
    "qk_nope_head_dim": 1,
    "qk_rope_head_dim": 2,
    "v_head_dim": 1,
    "max_position_embeddings": 1,
    "num_nextn_predict_layers": 0,
}
_FLAGS = ("norm_topk_prob", "attention_bias", "rope_interleave", "tie_word_embeddings")
_POSITIVE = ("routed_scaling_factor", "rms_norm_eps")
_NOT_NEGATIVE = ("initializer_range", "bias_update_speed", "aux_loss_alpha", "mtp_loss_weight")


def model_problems(config: DeepSeekV3Config) -> list[str]:
    """Everything wrong with ``config``; empty if it can be built."""
    return list(_type_problems(config)) or [*_size_problems(config), *_routing_problems(config)]


def yarn_problems(yarn: YarnConfig) -> list[str]:
    """Everything wrong with ``yarn``; empty if it can be built."""
    problems = [
        *_number_problems(yarn, ("factor",), least=1),
        *_number_problems(yarn, ("beta_fast", "beta_slow"), above=0),
        *_integer_problems(yarn, {"original_max_position_embeddings": 1}),
    ]
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        if getattr(yarn, name) is not None:
            problems += _number_problems(yarn, (name,), least=0)
    if not problems and yarn.beta_fast < yarn.beta_slow:
        problems.append(f"beta_fast={yarn.beta_fast} must be at least beta_slow={yarn.beta_slow}; exchange them")
    return problems


def _type_problems(config: DeepSeekV3Config) -> Iterator[str]:
    yield from _integer_problems(config, _COUNTS)
    if config.q_lora_rank is not None:
        yield from _integer_problems(config, {"q_lora_rank": 1}, remedy="or null for queries that are not compressed")
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            yield f"{name}={getattr(config, name)!r} must be true or false"
    yield from _number_problems(config, _POSITIVE, above=0)
    yield from _number_problems(config, _NOT_NEGATIVE, least=0)
    yield from _number_problems(config, ("rope_theta",), above=1)
    if not (config.rope_scaling is None or type(config.rope_scaling).__name__ == "YarnConfig"):
        yield f"rope_scaling={config.rope_scaling!r} must be a YarnConfig, or null for plain rotary embedding"


def _size_problems(config: DeepSeekV3Config) -> Iterator[str]:
    if config.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim={config.qk_rope_head_dim} must be even: rotary embedding turns pairs"
    if config.first_k_dense_replace > config.num_hidden_layers:
        yield (
            f"first_k_dense_replace={config.first_k_dense_replace} dense layers do not fit into "
            f"num_hidden_layers={config.num_hidden_layers}; use at most {config.num_hidden_layers}"
        )
    if config.moe_layer_freq != 1:
        yield f"moe_layer_freq={config.moe_layer_freq!r} must be 1: every layer after the dense ones has experts"


def _routing_problems(config: DeepSeekV3Config) -> Iterator[str]:
    experts, groups = config.n_routed_experts, config.n_group
    if config.scoring_func != "sigmoid":
        yield f"scoring_func={config.scoring_func!r} must be 'sigmoid', the gate of DeepSeek-V3"
    if config.topk_group > groups:
        yield f"topk_group={config.topk_group} groups cannot be chosen out of n_group={groups}; use at most {groups}"
    if experts % groups:
        fitting = [size for size in range(1, experts // 2 + 1) if experts % size == 0] or [1]
        yield f"n_group={groups} must divide n_routed_experts={experts}; use one of {', '.join(map(str, fitting))}"
        return
    if groups > 1 and experts // groups < 2:
        yield (
            f"n_group={groups} leaves {experts // groups} expert per group, a group is judged by its best 2; "
            f"use at most {experts // 2} groups, or n_group=1"
        )
    eligible = min(config.topk_group, groups) * (experts // groups)
    if config.num_experts_per_tok > eligible:
        yield (
            f"num_experts_per_tok={config.num_experts_per_tok} exceeds the {eligible} experts of "
            f"topk_group={config.topk_group} groups out of n_group={groups}; use at most {eligible} or more groups"
        )


def _integer_problems(config: object, least: dict[str, int], *, remedy: str = "") -> Iterator[str]:
    for name, minimum in least.items():
        value = getattr(config, name)
        if type(value) is not int or value < minimum:
            yield f"{name}={value!r} must be an integer of at least {minimum}{', ' + remedy if remedy else ''}"


def _number_problems(
    config: object, names: tuple[str, ...], *, above: float | None = None, least: float | None = None
) -> Iterator[str]:
    rule = f"greater than {above}" if above is not None else f"of at least {least}"
    for name in names:
        value: Any = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number and value < float("inf") and (value > above if above is not None else value >= least)
        if not fits:
            yield f"{name}={value!r} must be a number {rule}"
