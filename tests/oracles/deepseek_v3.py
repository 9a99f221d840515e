"""DeepSeek-V3 by its definition (technical report, section 2): one token, one head, one expert at a time.

Weights are a dict by the model's parameter names. Everything is differentiable torch code without a
single trick, so that autograd gives the gradients that the model must have. Equation numbers are the
report's; where it is silent (YaRN, interleaving) the released code decides.
"""

import math

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config

Weights = dict[str, Tensor]


def model(config: DeepSeekV3Config, weights: Weights, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Logits of the main model and of every depth, [B, T - k, V] each, and the balance loss of each sequence."""
    per_sequence = [_sequence(config, weights, tokens) for tokens in input_ids]
    logits = [torch.stack(depth) for depth in zip(*(logits for logits, _ in per_sequence), strict=True)]
    return logits, torch.stack([balance for _, balance in per_sequence])


def losses(config: DeepSeekV3Config, weights: Weights, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Means over labels, eq. 24 and 25, and the sequence-wise balance loss."""
    logits, balance = model(config, weights, input_ids)
    count = int((labels != -100).sum())
    total = {"next_token_loss": _cross_entropy(logits[0], labels), "balance_loss": balance.sum()}
    loss = total["next_token_loss"] + total["balance_loss"]
    if len(logits) > 1:
        depths = [_cross_entropy(ahead, labels[:, k:]) for k, ahead in enumerate(logits) if k > 0]
        total["mtp_loss"] = sum(depths) / len(depths)
        loss = loss + config.mtp_loss_weight * total["mtp_loss"]
    return {name: value / count for name, value in {"loss": loss, **total}.items()}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    total = logits.new_zeros(())
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label != -100:
            total = total - (row - row.exp().sum().log())[label]
    return total


def _sequence(config: DeepSeekV3Config, weights: Weights, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    embedding = weights["embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    h = torch.stack([embedding[token] for token in tokens.tolist()])
    balance = h.new_zeros(())
    for layer in range(config.num_hidden_layers):
        h, own = block(config, _under(weights, f"blocks.{layer}."), h, moe=layer >= config.first_k_dense_replace)
        balance = balance + own
    h = rms_norm(h, weights["norm.weight"], config.rms_norm_eps)
    logits = [h @ head.T]
    for depth in range(config.num_nextn_predict_layers):
        ahead = torch.stack([embedding[token] for token in tokens.tolist()[depth + 1 :]])
        h, own = mtp(config, _under(weights, f"mtp.{depth}."), h[:-1], ahead)
        balance = balance + own
        logits.append(h @ head.T)
    return logits, balance


def mtp(config: DeepSeekV3Config, weights: Weights, h: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 21-23 with the embedding first: ``h[i]`` of the depth before and the embedding of the token to join it."""
    joined = [
        weights["eh_proj.weight"]
        @ torch.cat(
            (
                rms_norm(embedding, weights["enorm.weight"], config.rms_norm_eps),
                rms_norm(state, weights["hnorm.weight"], config.rms_norm_eps),
            )
        )
        for state, embedding in zip(h, ahead, strict=True)
    ]
    h, balance = block(config, _under(weights, "block."), torch.stack(joined), moe=True)
    return rms_norm(h, weights["norm.weight"], config.rms_norm_eps), balance


def block(config: DeepSeekV3Config, weights: Weights, h: Tensor, *, moe: bool) -> tuple[Tensor, Tensor]:
    """One sequence ``h`` [T, D] through a decoder layer."""
    h = h + mla(
        config, _under(weights, "self_attn."), rms_norm(h, weights["input_layernorm.weight"], config.rms_norm_eps)
    )
    x = rms_norm(h, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    mlp = _under(weights, "mlp.")
    if not moe:
        return h + ffn(mlp, x), h.new_zeros(())
    y, balance = mixture(config, mlp, x)
    return h + y, balance


def mla(config: DeepSeekV3Config, weights: Weights, x: Tensor) -> Tensor:
    """Eq. 1-11 over one sequence ``x`` [T, D], head by head."""
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if config.q_lora_rank is None:
        queries = x @ weights["q_proj.weight"].T
    else:
        latent = _linear(weights, "q_a_proj", x)
        queries = rms_norm(latent, weights["q_a_layernorm.weight"], 1e-6) @ weights["q_b_proj.weight"].T
    down = _linear(weights, "kv_a_proj_with_mqa", x)
    latent, shared_key = down[:, : config.kv_lora_rank], rotate(config, down[:, config.kv_lora_rank :])
    keys_values = rms_norm(latent, weights["kv_a_layernorm.weight"], 1e-6) @ weights["kv_b_proj.weight"].T

    outputs = []
    for head in range(config.num_attention_heads):
        q = queries[:, head * (nope + rope) :][:, : nope + rope]
        kv = keys_values[:, head * (nope + value) :][:, : nope + value]
        q = torch.cat((q[:, :nope], rotate(config, q[:, nope:])), dim=1)
        k, v = torch.cat((kv[:, :nope], shared_key), dim=1), kv[:, nope:]
        rows = []
        for t in range(len(x)):
            scores = softmax_scale(config) * (k[: t + 1] @ q[t])
            probabilities = scores.exp() / scores.exp().sum()
            rows.append(probabilities @ v[: t + 1])
        outputs.append(torch.stack(rows))
    return _linear(weights, "o_proj", torch.cat(outputs, dim=1))


def rotate(config: DeepSeekV3Config, x: Tensor) -> Tensor:
    """``x`` [T, R]: every pair times exp(i t frequency), times YaRN's factor."""
    width = x.shape[1]
    pairs = [(2 * j, 2 * j + 1) if config.rope_interleave else (j, j + width // 2) for j in range(width // 2)]
    columns: list[Tensor] = [x[:, 0]] * width
    positions = torch.arange(len(x), dtype=torch.float64)
    for (a, b), frequency in zip(pairs, frequencies(config), strict=True):
        cos, sin = ((f(positions * frequency) * cos_sin_factor(config)).to(x.dtype) for f in (torch.cos, torch.sin))
        columns[a] = x[:, a] * cos - x[:, b] * sin
        columns[b] = x[:, a] * sin + x[:, b] * cos
    return torch.stack(columns, dim=1)


def frequencies(config: DeepSeekV3Config) -> list[float]:
    width, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = [base ** (-2 * j / width) for j in range(width // 2)]
    if yarn is None:
        return plain

    def pair_of(rotations: float) -> float:
        return width * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / 2 / math.log(base)

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = [min(max((j - low) / (high - low), 0), 1) for j in range(width // 2)]
    return [slow / yarn.factor * r + slow * (1 - r) for slow, r in zip(plain, ramp, strict=True)]


def cos_sin_factor(config: DeepSeekV3Config) -> float:
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return (0.1 * yarn.mscale * math.log(yarn.factor) + 1) / (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1)
    return 0.1 * math.log(yarn.factor) + 1


def softmax_scale(config: DeepSeekV3Config) -> float:
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2
    return scale


def mixture(config: DeepSeekV3Config, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 12-20 over one sequence ``x`` [T, D]; every expert computes every token it is asked for, one by one."""
    scores = torch.sigmoid(x @ weights["gate.weight"].T)
    rows = []
    for token, affinity in zip(x, scores, strict=True):
        y = torch.zeros_like(token)
        for expert, weight in route(config, affinity, weights["gate.e_score_correction_bias"]):
            gate, up = (weights["experts.gate_up_proj"][expert] @ token).chunk(2)
            y = y + weight * (weights["experts.down_proj"][expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(y)
    y = torch.stack(rows)
    if config.n_shared_experts:
        y = y + ffn(_under(weights, "shared_experts."), x)
    return y, len(x) * balance(config, scores)


def route(config: DeepSeekV3Config, affinity: Tensor, bias: Tensor) -> list[tuple[int, Tensor]]:
    """``(expert, weight)`` of one token, best first, eq. 13-16; of equal experts the first."""
    biased = [s + b for s, b in zip(affinity.tolist(), bias.tolist(), strict=True)]
    size = config.n_routed_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    strength = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(config.n_group), key=lambda g: (-strength[g], g))[: config.topk_group]
    eligible = [expert for g in sorted(best) for expert in groups[g]]
    chosen = sorted(eligible, key=lambda e: (-biased[e], e))[: config.num_experts_per_tok]
    total = sum(affinity[expert] for expert in chosen) if config.norm_topk_prob else 1
    return [(expert, config.routed_scaling_factor * affinity[expert] / total) for expert in chosen]


def balance(config: DeepSeekV3Config, scores: Tensor) -> Tensor:
    """Eq. 17-20 of one sequence's affinities [T, E]: alpha sum_i f_i P_i."""
    num_tokens, num_experts = scores.shape
    total = scores.new_zeros(())
    for i in range(num_experts):
        among_best = sum(
            i in sorted(range(num_experts), key=lambda e: (-float(row[e]), e))[: config.num_experts_per_tok]
            for row in scores.detach()
        )
        f = num_experts / (config.num_experts_per_tok * num_tokens) * among_best
        total = total + f * sum(row[i] / row.sum() for row in scores) / num_tokens
    return config.aux_loss_alpha * total


def ffn(weights: Weights, x: Tensor) -> Tensor:
    gate, up = x @ weights["gate_proj.weight"].T, x @ weights["up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ weights["down_proj.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
