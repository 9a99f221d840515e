"""How many parameters a configuration has and how much arithmetic a token costs, without building it.

    671b: 671.0B parameters, of which a token uses 37.6B; 11.6B more for multi-token prediction
          250.4 GFLOP per trained token at 4096 tokens

A parameter is whatever a checkpoint stores: the routers' correction biases count. FLOPs are those of
matrix multiplications, two per multiply-add; attention is causal, so a token sees half the sequence.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config

__all__ = ["Components", "ForwardFlops", "ParameterCount", "count_parameters", "forward_flops", "training_flops"]


@dataclass(frozen=True, slots=True)
class Components:
    """Parameters by what they are for."""

    embedding: int = 0
    attention: int = 0  # with the norms of its latents
    dense_ffn: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    router: int = 0
    norms: int = 0
    projection: int = 0  # of multi-token prediction
    head: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: Components) -> Components:
        return Components(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Components:
        return Components(*(times * count for count in astuple(self)))


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """``activated`` is what one token uses, embedding and head included; ``mtp`` its own, without those."""

    main: Components
    activated: Components
    mtp: Components
    mtp_activated: Components

    @property
    def total(self) -> int:
        """Of the main model."""
        return self.main.total

    @property
    def total_with_mtp(self) -> int:
        return self.main.total + self.mtp.total

    def __str__(self) -> str:
        columns = (self.main, self.activated, self.mtp)
        names = [field.name for field in fields(Components)] + ["total"]
        rows = [(name, *(getattr(column, name) for column in columns)) for name in names]
        lines = [f"{'':16}{'main':>20}{'activated':>20}{'multi-token':>20}"]
        lines += [f"{name:16}" + "".join(f"{count:>20,}" for count in counts) for name, *counts in rows if any(counts)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """FLOPs of one token's forward through one of each."""

    dense_block: float
    moe_block: float
    mtp: float  # one depth, without its pass through the head
    head: float


def count_parameters(config: DeepSeekV3Config) -> ParameterCount:
    """Exact: equal to what the built model holds."""
    dense, moe = _block(config, _dense_ffn(config)), _block(config, _moe(config, config.n_routed_experts))
    used = _block(config, _moe(config, config.num_experts_per_tok))
    num_dense = config.first_k_dense_replace
    num_moe = config.num_hidden_layers - num_dense
    table = config.vocab_size * config.hidden_size
    ends = Components(embedding=table, norms=config.hidden_size, head=0 if config.tie_word_embeddings else table)
    used_ends = Components(embedding=table, norms=config.hidden_size, head=table)
    own = Components(projection=2 * config.hidden_size**2, norms=3 * config.hidden_size)
    depths = config.num_nextn_predict_layers
    return ParameterCount(
        main=dense * num_dense + moe * num_moe + ends,
        activated=dense * num_dense + used * num_moe + used_ends,
        mtp=(moe + own) * depths,
        mtp_activated=(used + own) * depths,
    )


def forward_flops(config: DeepSeekV3Config, sequence_length: int) -> ForwardFlops:
    """Per token of a sequence of that length."""
    heads, widths = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    attention = 2 * _attention_matrices(config) + 2 * heads * widths * (sequence_length / 2)
    moe = attention + 2 * _moe(config, config.num_experts_per_tok).total - 2 * config.n_routed_experts  # the bias
    return ForwardFlops(
        dense_block=attention + 2 * _dense_ffn(config).total,
        moe_block=moe,
        mtp=moe + 4 * config.hidden_size**2,
        head=2.0 * config.vocab_size * config.hidden_size,
    )


def training_flops(config: DeepSeekV3Config, sequence_length: int, *, mtp: bool = True) -> float:
    """FLOPs of forward and backward per token: three times the forward's. What MFU is measured by."""
    one = forward_flops(config, sequence_length)
    num_moe = config.num_hidden_layers - config.first_k_dense_replace
    forward = config.first_k_dense_replace * one.dense_block + num_moe * one.moe_block + one.head
    if mtp:
        forward += config.num_nextn_predict_layers * (one.mtp + one.head)
    return 3 * forward


def _block(config: DeepSeekV3Config, feed_forward: Components) -> Components:
    return _attention(config) + feed_forward + Components(norms=2 * config.hidden_size)


def _attention(config: DeepSeekV3Config) -> Components:
    q_rank = config.q_lora_rank or 0
    latent_norms = q_rank + config.kv_lora_rank
    biases = q_rank + config.kv_lora_rank + config.qk_rope_head_dim + config.hidden_size
    extra = latent_norms + (biases if config.attention_bias else 0)
    return Components(attention=_attention_matrices(config) + extra)


def _attention_matrices(config: DeepSeekV3Config) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_width = heads * config.qk_head_dim
    rank = config.q_lora_rank
    queries = hidden * query_width if rank is None else rank * (hidden + query_width)
    keys_values = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    keys_values += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return queries + keys_values + heads * config.v_head_dim * hidden


def _dense_ffn(config: DeepSeekV3Config) -> Components:
    return Components(dense_ffn=3 * config.hidden_size * config.intermediate_size)


def _moe(config: DeepSeekV3Config, num_experts: int) -> Components:
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return Components(
        routed_experts=num_experts * expert,
        shared_experts=config.n_shared_experts * expert,
        router=config.n_routed_experts * (config.hidden_size + 1),
    )
