"""The configuration of a DeepSeek-V3 model: its shape, and how its router and losses are trained.

Fields that Hugging Face's ``config.json`` has bear the same names and mean the same; the last three
are the training constants of the technical report (arXiv:2412.19437), section 4.2. A configuration
is a value: ``from_preset`` makes one, ``with_overrides`` varies it, and what cannot be built is
refused at once with every reason. Reading and writing ``config.json`` is ``hf_config``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, TypedDict, Unpack, get_args

from lightning_dualpipe.deepseek_v3.config_rules import model_problems, yarn_problems
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["ConfigOverrides", "DeepSeekV3Config", "Preset", "YarnConfig"]

Preset = Literal["tiny", "small", "16b", "671b"]


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN (arXiv:2309.00071): rotary frequencies stretched for ``factor`` times the trained length.

    Frequencies that turn more than ``beta_fast`` times within the original length stay, those that
    turn less than ``beta_slow`` times are divided by ``factor``, with a ramp in between.
    ``attention_factor`` multiplies cosine and sine; None derives it from the two mscales.
    """

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True  # round the ends of the ramp outwards to whole frequencies

    def __post_init__(self) -> None:
        if problems := yarn_problems(self):
            raise ConfigurationError.of("this YaRN rope scaling cannot be built", problems)


@dataclass(frozen=True, slots=True)
class DeepSeekV3Config:
    """Defaults are those of the released 671B model, without YaRN."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432  # of the leading dense layers
    moe_intermediate_size: int = 2048  # of one expert
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: Literal["sigmoid"] = "sigmoid"
    first_k_dense_replace: int = 3  # number of leading dense layers
    moe_layer_freq: Literal[1] = 1
    q_lora_rank: int | None = 1536  # None: queries are not compressed
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True  # rotate neighbours (x0, x1), as in the released weights, not halves
    rope_scaling: YarnConfig | None = None
    max_position_embeddings: int = 163840
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1  # depths of multi-token prediction
    initializer_range: float = 0.006
    bias_update_speed: float = 1e-3  # gamma: of the router's bias, per optimizer step
    aux_loss_alpha: float = 1e-4  # alpha: weight of the sequence-wise balance loss
    mtp_loss_weight: float = 0.3  # lambda: weight of the multi-token prediction losses

    def __post_init__(self) -> None:
        if problems := model_problems(self):
            raise ConfigurationError.of("this DeepSeek-V3 configuration cannot be built", problems)

    @classmethod
    def from_preset(cls, name: Preset, **overrides: Unpack[ConfigOverrides]) -> DeepSeekV3Config:
        """A preset, with any fields replaced; ``rope_scaling`` may be a mapping of ``YarnConfig`` fields.

        ``tiny``   2.4M parameters, bytes as tokens: learns text on a laptop. Its latent keeps the 512 + 64 of
                   the large models, for serving engines that know no other size.
        ``small``  100M parameters, for one GPU.
        ``16b``    the smaller model of the report's ablations (section 4.5): the shape of DeepSeek-V2-Lite with
                   V3's sigmoid gating, normalised top-k and bias-based balancing, before context extension.
        ``671b``   DeepSeek-V3 as released.

        Raises:
            ConfigurationError: unknown preset or field, or values that do not fit together.
        """
        if name not in _PRESETS:
            raise ConfigurationError(f"preset={name!r} is not one of {', '.join(_PRESETS)}{_nearest(name, _PRESETS)}")
        return cls(**_checked({**_PRESETS[name], **overrides}))

    def with_overrides(self, **overrides: Unpack[ConfigOverrides]) -> DeepSeekV3Config:
        """The same with any fields replaced, as ``from_preset`` replaces a preset's."""
        return replace(self, **_checked(overrides))

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` is a mixture of experts. Multi-token prediction layers always are."""
        return layer >= self.first_k_dense_replace


class ConfigOverrides(TypedDict, total=False):
    """Any fields of ``DeepSeekV3Config``, typed for command lines and configuration files."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    scoring_func: Literal["sigmoid"]
    first_k_dense_replace: int
    moe_layer_freq: Literal[1]
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rms_norm_eps: float
    rope_theta: float
    rope_interleave: bool
    rope_scaling: YarnConfig | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    initializer_range: float
    bias_update_speed: float
    aux_loss_alpha: float
    mtp_loss_weight: float


_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vocab_size": 264,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
    },
    "small": {
        "vocab_size": 32768,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
    },
    "16b": {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "max_position_embeddings": 4096,
    },
    "671b": {"rope_scaling": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
}
assert tuple(_PRESETS) == get_args(Preset), "Preset lists the presets"


def _checked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown(overrides, DeepSeekV3Config, what="override")
    values = dict(overrides)
    if isinstance(scaling := values.get("rope_scaling"), Mapping):
        _refuse_unknown(scaling, YarnConfig, what="rope_scaling field")
        values["rope_scaling"] = YarnConfig(**scaling)
    return values


def _refuse_unknown(given: Mapping[str, object], dataclass: type, *, what: str) -> None:
    known = [field.name for field in fields(dataclass)]
    problems = [
        f"{name}={value!r}: there is no such field{_nearest(name, known) or '; the fields are ' + ', '.join(known)}"
        for name, value in given.items()
        if name not in known
    ]
    if problems:
        raise ConfigurationError.of(f"unknown {what}", problems)


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
