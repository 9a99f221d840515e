"""``config.json`` of Hugging Face directories, both ways.

Two dialects are in use, and both are read and written:

    old (DeepSeek's own files, transformers < 5)       new (transformers >= 5)
    "rope_theta": 10000.0                              "rope_parameters": {"rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": …}          "rope_type": "yarn", "factor": …}
    "torch_dtype": "bfloat16"                          "dtype": "bfloat16"

Where they contradict each other, the order is that of transformers: ``rope_scaling`` before
``rope_parameters``, an inner ``rope_theta`` before an outer one.

What the file says is taken, also where training used other values than the file's: published files
say ``initializer_range`` 0.02 and some ``aux_loss_alpha`` 0.001, the technical report (section 4.2)
0.006 and 0.0001. What the file leaves out is the report's. A setting that would change the numbers
and that this model cannot follow is refused, never skipped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config, YarnConfig
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["ARCHITECTURE", "TOKEN_IDS", "config_from_hf", "config_to_hf", "declared_mtp_layers", "generation_config"]

ARCHITECTURE = "DeepseekV3ForCausalLM"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "n_routed_experts", "num_experts_per_tok", "max_position_embeddings"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
"""Sizes that every file states; any default for them would be a guess."""
_ONLY: Mapping[str, tuple[object, str]] = {
    "hidden_act": ("silu", "the experts are SwiGLU"),
    "scoring_func": ("sigmoid", "softmax gates are DeepSeek-V2's"),
    "topk_method": ("noaux_tc", "experts are chosen by biased scores in groups"),
    "moe_layer_freq": (1, "every layer after the dense ones has experts"),
    "attention_dropout": (0.0, "there is no dropout; set it to 0, which changes nothing outside of training"),
    "partial_rotary_factor": (1.0, "all rotary dimensions are turned"),
}
_NULL_MEANS: Mapping[str, object] = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0}
_NOT_TAKEN_OVER = ("rope_theta", "rope_scaling", "num_nextn_predict_layers")


def config_from_hf(settings: Mapping[str, Any]) -> DeepSeekV3Config:
    """The configuration that the content of a ``config.json`` describes.

    Depths of multi-token prediction that are not declared are 0; whether declared ones are in the
    files is ``read_pretrained_config``'s to see.

    Raises:
        ConfigurationError: not DeepSeek-V3, sizes missing, or settings that cannot be followed.
    """
    if problems := list(_problems(settings)):
        raise ConfigurationError.of("this config.json cannot be imported", problems)
    rope = _rope(settings)
    values: dict[str, Any] = {
        field.name: settings[field.name]
        for field in fields(DeepSeekV3Config)
        if field.name in settings and field.name not in _NOT_TAKEN_OVER
    }
    values |= {name: value for name, value in _NULL_MEANS.items() if name in settings and settings[name] is None}
    values["rope_theta"] = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
    values["rope_scaling"] = _yarn(rope, settings) if _rope_type(rope) == "yarn" else None
    values["num_nextn_predict_layers"] = declared_mtp_layers(settings) or 0
    return DeepSeekV3Config(**_with_floats(values, DeepSeekV3Config))


def declared_mtp_layers(settings: Mapping[str, Any]) -> int | None:
    """Depths of multi-token prediction that a ``config.json`` declares; None if it says nothing."""
    declared: int | None = settings.get("num_nextn_predict_layers", settings.get("num_mtp_layers"))
    return declared


def config_to_hf(
    config: DeepSeekV3Config,
    *,
    dtype: str = "bfloat16",
    token_ids: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A ``config.json`` for ``config`` that both dialects' readers and serving engines understand.

    ``topk_method`` and ``scoring_func`` have no effect in transformers, but without them vLLM finds
    no router bias or routes by softmax. Training constants that only this package knows go along.
    ``dtype`` is that of the tensors which ``quantization``, the ``quantization_config``, leaves as they are.
    ``token_ids`` are any of ``TOKEN_IDS``; one that is not given is null, for the readers' own
    defaults would be DeepSeek's ids.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "rope_scaling"}
    rope = _rope_to_hf(config.rope_scaling)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "deepseek_v3",
        **values,
        **{name: only for name, (only, _) in _ONLY.items() if name != "partial_rotary_factor"},
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": {"type": "yarn", **rope} if rope else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **(rope or {"rope_type": "default"})},
        "ep_size": 1,
        "pretraining_tp": 1,
        "seq_aux": True,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **({"quantization_config": dict(quantization)} if quantization else {}),
        **_all_token_ids(token_ids or {}),
    }


def generation_config(token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """A minimal ``generation_config.json``: which tokens begin and end a text."""
    return {"_from_model_config": True, **{name: value for name, value in token_ids.items() if value is not None}}


def _problems(settings: Mapping[str, Any]) -> Iterator[str]:
    model_type, architectures = settings.get("model_type"), settings.get("architectures") or []
    if model_type != "deepseek_v3" and ARCHITECTURE not in architectures:
        yield (
            f"model_type={model_type!r} with architectures={architectures!r} is another model; "
            f"model_type must be 'deepseek_v3' or the architecture {ARCHITECTURE}"
        )
    for name in _REQUIRED:
        if name not in settings:
            yield f"{name} is missing; every DeepSeek-V3 configuration states it, so the file is not whole"
    for name, (only, reason) in _ONLY.items():
        if settings.get(name, only) not in (only, None):
            yield f"{name}={settings[name]!r} is not supported, only {only!r}: {reason}"
    heads, key_value_heads = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if key_value_heads not in (None, heads):
        yield (
            f"num_key_value_heads={key_value_heads!r} must equal num_attention_heads={heads!r}: "
            "latent attention gives every head a key and value of its own"
        )
    if settings.get("aux_loss_alpha") and settings.get("seq_aux") is False:
        yield "seq_aux=False is not supported: the balance loss is taken per sequence; set it true, or aux_loss_alpha=0"
    yield from _rope_problems(settings)
    yield from _quantization_problems(settings.get("quantization_config"))


def _rope_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(settings.get(name) or {}, Mapping):
            yield f"{name}={settings[name]!r} must be null or an object with a rope_type"
            return
    if (rope_type := _rope_type(_rope(settings))) not in ("default", "yarn"):
        yield f"rope type {rope_type!r} is not supported, only 'default' and 'yarn'"


def _quantization_problems(quantization: Any) -> Iterator[str]:
    if quantization is None:
        return
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        yield f"quant_method={method!r} is not supported, only 'fp8' in blocks; import the model in bf16 instead"
        return
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        yield f"weight_block_size={block!r} must be two sizes such as [128, 128]; FP8 without blocks is not supported"
    if (fmt := quantization.get("fmt")) not in (None, "e4m3"):
        yield f"fmt={fmt!r} of quantization_config is not supported, only 'e4m3'; import the model in bf16 instead"


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return settings.get("rope_scaling") or settings.get("rope_parameters") or {}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _yarn(rope: Mapping[str, Any], settings: Mapping[str, Any]) -> YarnConfig:
    """Absent and null values mean what they mean in transformers' YaRN."""
    values = {field.name: rope.get(field.name) for field in fields(YarnConfig)}
    length = settings["max_position_embeddings"]
    original = settings.get("original_max_position_embeddings") or values["original_max_position_embeddings"] or length
    values["original_max_position_embeddings"] = original
    if values["factor"] is None and type(length) is type(original) is int and original > 0:
        values["factor"] = length / original
    for name in ("beta_fast", "beta_slow"):
        values[name] = values[name] or getattr(_YARN_DEFAULTS, name)
    values["truncate"] = rope.get("truncate", True)
    return YarnConfig(**_with_floats(values, YarnConfig))


_YARN_DEFAULTS = YarnConfig()


def _rope_to_hf(yarn: YarnConfig | None) -> dict[str, Any]:
    if yarn is None:
        return {}
    assumed = {"mscale": None, "mscale_all_dim": None, "attention_factor": None, "truncate": True}  # by every reader
    return {
        "rope_type": "yarn",
        **{name: value for name, value in asdict(yarn).items() if assumed.get(name, ...) != value},
    }


def _with_floats(values: Mapping[str, Any], dataclass: type) -> dict[str, Any]:
    """JSON writes 40.0 as 40 at times; a field that is declared a float gets one."""
    floats = {field.name for field in fields(dataclass) if "float" in str(field.type)}
    return {name: float(value) if name in floats and type(value) is int else value for name, value in values.items()}


def _all_token_ids(token_ids: Mapping[str, Any]) -> dict[str, Any]:
    assert set(token_ids) <= set(TOKEN_IDS), f"{sorted(set(token_ids) - set(TOKEN_IDS))} are no token ids"
    return {name: token_ids.get(name) for name in TOKEN_IDS}
