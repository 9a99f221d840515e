"""A DeepSeek-V3 configuration as the planner's value: parameters, FLOPs and kept values of each layer.

Parameters and FLOPs are ``deepseek_v3.count``'s, divided by layer. What a layer keeps for its backward (section 3.2.3
of arXiv:2412.19437) is the input of every matrix product, the two residual streams and attention's output; the report
does not keep, but computes again, the norms, the queries, keys and values out of their latents, and SwiGLU's output.
"""

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.count import Components, count_parameters, forward_flops, training_flops
from lightning_dualpipe.planner.model import Kept, LayerShape, ModelShape, Work

__all__ = ["model_shape"]


def model_shape(config: DeepSeekV3Config, *, name: str, sequence_length: int) -> ModelShape:
    dense = _block(config, sequence_length, moe=False)
    moe = _block(config, sequence_length, moe=True)
    blocks = [
        LayerShape(f"blocks.{index}", *(moe if config.is_moe(index) else dense))
        for index in range(config.num_hidden_layers)
    ]
    return ModelShape(
        name=name,
        sequence_length=sequence_length,
        hidden=config.hidden_size,
        num_experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
        num_groups=config.n_group,
        groups_per_token=config.topk_group,
        training_flops=training_flops(config, sequence_length),
        layers=(_embedding(config), *blocks, *_tail(config, sequence_length)),
    )


def _embedding(config: DeepSeekV3Config) -> LayerShape:
    work = Work(values=2.0 * config.hidden_size)
    return LayerShape("embed_tokens", _table(config), feed_forward=work, cost=2.0 * config.hidden_size)


def _block(config: DeepSeekV3Config, length: int, *, moe: bool) -> tuple[int, int, int, Work, Work, Kept, int, float]:
    """The fields of a block's ``LayerShape``, after its name."""
    flops = forward_flops(config, length)
    if not moe:
        width = config.intermediate_size
        ffn = Work(matmul=6.0 * config.hidden_size * width, values=2.0 * config.hidden_size + 3 * width)
        kept = _kept_by_attention(config) + Kept(cast=2 * width, cast_again=width)
        dense = _per_block(config).total + 3 * config.hidden_size * width
        return dense, 0, 0, _attention(config, length), ffn, kept, 0, flops.dense_block
    used, width = config.num_experts_per_tok + config.n_shared_experts, config.moe_intermediate_size
    ffn = Work(
        matmul=6.0 * used * config.hidden_size * width,
        plain=2.0 * config.n_routed_experts * config.hidden_size,  # the router
        values=used * (2.0 * config.hidden_size + 3 * width),
    )
    # Dispatched tokens are kept: fetching them again would be another all-to-all.
    sent = config.num_experts_per_tok * config.hidden_size
    kept = _kept_by_attention(config) + Kept(cast=sent + 2 * used * width, cast_again=used * width)
    expert = 3 * config.hidden_size * width
    dense = _per_block(config).total + config.n_shared_experts * expert
    dense += config.n_routed_experts * (config.hidden_size + 1)
    experts = config.n_routed_experts * expert
    return dense, experts, 0, _attention(config, length), ffn, kept, 1, flops.moe_block


def _per_block(config: DeepSeekV3Config) -> Components:
    """Attention and norms of one block."""
    attention = count_parameters(config).main.attention // config.num_hidden_layers
    return Components(attention=attention, norms=2 * config.hidden_size)


def _attention(config: DeepSeekV3Config, length: int) -> Work:
    heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.q_lora_rank
    queries, latent = heads * config.qk_head_dim, config.kv_lora_rank
    keys_values = heads * (config.qk_nope_head_dim + config.v_head_dim)
    core = float(heads * (config.qk_head_dim + config.v_head_dim) * length)  # causal: half the positions
    ffn = 6.0 * hidden * config.intermediate_size
    down = hidden + queries if rank is None else hidden + rank + rank + queries
    widths = down + hidden + latent + config.qk_rope_head_dim + latent + keys_values
    widths += heads * config.v_head_dim + hidden
    return Work(
        matmul=forward_flops(config, length).dense_block - ffn - core,
        core=core,
        again=2.0 * (latent * keys_values + (rank or 0) * queries),
        values=float(widths),
    )


def _kept_by_attention(config: DeepSeekV3Config) -> Kept:
    """Of a block: also its two residual streams, which are the inputs of its norms."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank
    output = heads * config.v_head_dim
    projected = heads * (2 * config.qk_head_dim + config.v_head_dim)  # queries, keys and values, as attention has them
    again = 0 if config.q_lora_rank else heads * config.qk_head_dim  # uncompressed queries have no cheap origin
    return Kept(
        plain=2 * hidden + latents + config.qk_rope_head_dim + output + 2 * heads + again,  # and a float per head
        plain_again=projected - again,
        cast_again=2 * hidden + latents,
    )


def _tail(config: DeepSeekV3Config, length: int) -> list[LayerShape]:
    depths, hidden = config.num_nextn_predict_layers, config.hidden_size
    table, tied = _table(config), config.tie_word_embeddings
    flops = forward_flops(config, length)
    layers = [LayerShape("norm", hidden, kept=Kept(plain=hidden), cost=2.0 * hidden)]
    if depths:
        own = count_parameters(config).mtp
        _, experts, _, attention, ffn, kept, routed, _ = _block(config, length, moe=True)
        mtp = LayerShape(
            name="mtp",
            dense=own.total // depths - experts,
            experts=experts,
            borrowed=table,
            attention=attention,
            feed_forward=ffn + Work(plain=4.0 * hidden**2, values=3.0 * hidden),
            kept=kept + Kept(plain=2 * hidden),
            routed=routed,
            cost=flops.mtp,
            with_previous=True,
        )
        layers += [mtp] * depths
    heads = 1 + depths
    head = LayerShape(
        name="lm_head",
        dense=0 if tied else table,
        borrowed=table if tied else 0,
        feed_forward=Work(plain=heads * flops.head, values=heads * (hidden + 2.0 * config.vocab_size)),
        kept=Kept(plain=heads * hidden),
        cost=heads * flops.head,
        with_previous=True,
        logits=heads * config.vocab_size,
    )
    return [*layers, head]


def _table(config: DeepSeekV3Config) -> int:
    return config.vocab_size * config.hidden_size
