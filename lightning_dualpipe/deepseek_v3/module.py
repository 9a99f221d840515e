"""``DeepSeekV3``: the model as a LightningModule, trained as the technical report does (section 4.2).

The same module runs under ``strategy="auto"``, ``"ddp"`` and ``"dualpipe"``: it calls the model and
logs what comes back. What it asks a strategy for beyond Lightning is ``interface.ReplicaAware``:
sums and norms over ranks that hold different parts of one model.

The parameters are on the meta device until a Trainer has cut the model, or until the module is used
without one.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_dualpipe.deepseek_v3.config import ConfigOverrides, DeepSeekV3Config, Preset
from lightning_dualpipe.deepseek_v3.convert import load_pretrained, read_token_ids
from lightning_dualpipe.deepseek_v3.count import count_parameters, training_flops
from lightning_dualpipe.deepseek_v3.data_contract import (
    TokenIds,
    check_data,
    check_token_ids,
    token_ids_of,
    tokenizer_files_of,
)
from lightning_dualpipe.deepseek_v3.generation.generates import Generates
from lightning_dualpipe.deepseek_v3.learning_rate import LearningRateSchedule, learning_rate_factor
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.deepseek_v3.optimizer import Moments, build_optimizer, check_moments
from lightning_dualpipe.deepseek_v3.padding import MASK
from lightning_dualpipe.deepseek_v3.pretrained import Pretrained, configuration
from lightning_dualpipe.deepseek_v3.recompute import Recompute
from lightning_dualpipe.deepseek_v3.token_count import TokenCount
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Batch, ReplicaAware

__all__ = ["DeepSeekV3"]


class DeepSeekV3(Generates, Pretrained, LightningModule):
    """A trainable DeepSeek-V3.

    Args:
        preset: ``tiny``, ``small``, ``16b`` or ``671b``: the configuration to start from. Default: ``tiny``.
        overrides: fields of ``DeepSeekV3Config`` that differ from the preset.
        config: a whole configuration instead of preset and overrides.
        pretrained: a Hugging Face directory to begin with, instead of a preset. Its weights are read when a Trainer has
            cut the model, by every rank its part; a checkpoint that the run goes on from takes their place.
        learning_rate: the highest one.
        learning_rate_schedule: ``constant``, ``cosine`` (to ``minimum_learning_rate_ratio`` at the end of training)
            or ``report``: constant for 10T tokens, cosine over 4.3T, then two constant rates.
        warmup_steps: optimizer steps in which the rate rises from zero.
        weight_decay: of matrices; norms and biases have none.
        betas: of AdamW.
        moments: what AdamW keeps its two moments in. The report's are in ``bfloat16``, in half the memory.
        balance_tokens: tokens after which the routers' biases stay as they are (report: 14.3T of 14.8T).
        mtp_loss_weights: weight of multi-token prediction from a number of tokens on, for instance
            ``{0: 0.3, 10000000000000: 0.1}``. Default: the configuration's, throughout.
        recompute: what backward computes again to save memory. ``selective``: what the report does, norms,
            up-projections of attention and SwiGLU; ``selective_fp8``: and keeps inputs of experts' SwiGLUs in FP8,
            as the report, which changes gradients; ``full``: everything but what was exchanged between ranks.
        seed: of the initial weights, which depend on it and on parameter names only. Default: the seed of
            ``seed_everything``, or 0.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` for ``save_pretrained``. What the data that
            ``fit`` is given say of these takes their place.
    """

    model: Transformer

    def __init__(
        self,
        preset: Preset | None = None,
        overrides: ConfigOverrides | None = None,
        *,
        config: DeepSeekV3Config | None = None,
        pretrained: str | Path | None = None,
        learning_rate: float = 2.2e-4,
        learning_rate_schedule: LearningRateSchedule = "constant",
        minimum_learning_rate_ratio: float = 0.1,
        warmup_steps: int = 2000,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        moments: Moments = "float32",
        balance_tokens: float = math.inf,
        mtp_loss_weights: dict[int, float] | None = None,
        recompute: Recompute = "none",
        seed: int | None = None,
        token_ids: TokenIds | None = None,
    ) -> None:
        super().__init__()
        check_token_ids(token_ids or {})
        check_moments(moments)
        if recompute not in get_args(Recompute):
            raise ConfigurationError(f"recompute={recompute!r} is not one of {', '.join(get_args(Recompute))}")
        self.config = configuration(preset, overrides, config, pretrained)
        if token_ids is None and pretrained is not None:
            token_ids = read_token_ids(pretrained)
        # plain values, so that checkpoints load without running code; the configuration is kept whole
        self.save_hyperparameters(
            {
                "preset": None,
                "overrides": asdict(self.config),
                "learning_rate": learning_rate,
                "learning_rate_schedule": learning_rate_schedule,
                "minimum_learning_rate_ratio": minimum_learning_rate_ratio,
                "warmup_steps": warmup_steps,
                "weight_decay": weight_decay,
                "betas": tuple(betas),
                "moments": moments,
                "balance_tokens": balance_tokens,
                "mtp_loss_weights": mtp_loss_weights,
                "recompute": recompute,
                "seed": seed,
                "token_ids": token_ids,
            }
        )
        self._tokens = TokenCount()
        self.expert_load: dict[str, Tensor] = {}
        """Tokens per expert [E] of the last optimizer step, by router, over all ranks; of the layers held here."""
        self._pretrained = Path(pretrained) if pretrained is not None else None
        self.tokenizer_files = {}
        with torch.device("meta"):
            self.model = Transformer(self.config, recompute=recompute)

    # ---- weights ------------------------------------------------------------------------------

    @override
    def configure_model(self) -> None:
        """Give the parameters memory, unless a strategy is about to cut the model first."""
        if torch.get_default_device().type != "meta" and self._is_meta():
            # a Trainer's precision sets the default; a checkpoint restored before it converts would lose digits
            self.model.to(torch.get_default_dtype())
            self.model.to_empty(device=torch.get_default_device())
            self.initialize_weights()

    def initialize_weights(self) -> None:
        """Fill the parameters held here: initial weights, or those of ``pretrained``."""
        if self._pretrained is not None:
            load_pretrained(self.model, self._pretrained)
        else:
            self.model.initialize_weights(self._seed())

    def num_parameters(self, mtp: bool = False) -> int:
        """Of the whole model, whether or not it has been built; by default without multi-token prediction."""
        count = count_parameters(self.config)
        return count.total_with_mtp if mtp else count.total

    def num_active_parameters(self) -> int:
        """Used by one token, embedding and head included."""
        return count_parameters(self.config).activated.total

    def training_flops(self, sequence_length: int) -> float:
        """Of forward and backward per token: what ``callbacks.Throughput`` takes MFU from."""
        return training_flops(self.config, sequence_length)

    # ---- data ---------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        check_data(self.config, data)
        if stage == TrainerFn.FITTING and (found := token_ids_of(data)):
            self.hparams["token_ids"] = {**(self.hparams["token_ids"] or {}), **found}
            self.tokenizer_files = tokenizer_files_of(data)

    # ---- steps --------------------------------------------------------------------------------

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``input_ids [B, T] -> logits [B, T, V]``; a mask (see ``padding``) is looked at, and changes nothing."""
        self.configure_model()
        mask = {} if attention_mask is None else {MASK: attention_mask}
        return cast(Tensor, self.model({"input_ids": input_ids, **mask}))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.model.mtp_loss_weight = self._mtp_loss_weight()
        means: Mapping[str, Tensor] = self.model(batch)
        self._tokens.add(self._over_data_ranks(means["tokens"]))
        self.log("train_loss", means["loss"].detach(), prog_bar=True)
        self.log_dict({f"train_{name}": value for name, value in means.items() if name not in ("loss", "tokens")})
        return means["loss"]

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_evaluation("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_evaluation("test", batch)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits."""
        return self(batch["input_ids"], batch.get(MASK))

    def _log_evaluation(self, stage: str, batch: Batch) -> None:
        """``val_loss`` is the next-token loss in nats per token; means over an epoch are over its tokens."""
        means: Mapping[str, Tensor] = self.model(batch)
        size = int(means["tokens"])
        self.model.padding.collect()  # the device has been waited for
        self.log(f"{stage}_loss", means["next_token_loss"], batch_size=size, sync_dist=True, prog_bar=True)
        for name in ("mtp_loss", "mtp_agreement"):
            if name in means:
                self.log(f"{stage}_{name}", means[name], batch_size=size, sync_dist=True)

    @override
    def on_train_end(self) -> None:
        self.model.padding.collect(wait=True)  # nobody asks for the answers of the last batches

    @override
    def on_predict_end(self) -> None:
        self.model.padding.collect(wait=True)

    # ---- optimization -------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        hparams = self.hparams
        optimizer = build_optimizer(
            self.parameters(),
            learning_rate=hparams["learning_rate"],
            weight_decay=hparams["weight_decay"],
            betas=tuple(hparams["betas"]),
            moments=hparams["moments"],
            # mixed precision plugins refuse to clip gradients for optimizers that can unscale them, as the fused can
            fused="mixed" not in str(self.trainer.precision),
        )
        factor = learning_rate_factor(
            hparams["learning_rate_schedule"],
            warmup_steps=hparams["warmup_steps"],
            total_steps=self._total_steps() if hparams["learning_rate_schedule"] == "cosine" else None,
            floor=hparams["minimum_learning_rate_ratio"],
        )
        scheduler = LambdaLR(optimizer, lambda step: factor(step, lambda: self.tokens_seen))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._logs_now():
            self.log("grad_norm", self._gradient_norm())

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._tokens.keep()
        self._balance_experts()

    def on_step_skipped(self) -> None:
        """See ``interface.ForgetsSteps``. Of a load of nothing, no bias moves."""
        self._tokens.take_back()
        self.model.forget_load()

    def _balance_experts(self) -> None:
        """Move the routers' biases against the load of the whole step, all microbatches and ranks."""
        routers = dict(self.model.routers())
        counts = {f"model.{name}.weight": router.tokens_per_expert for name, router in routers.items()}
        summed = self._over_replicas(counts)
        until = self.hparams["balance_tokens"]
        gamma = self.config.bias_update_speed if until == math.inf or self.tokens_seen <= until else 0.0
        for (name, router), counts_E in zip(routers.items(), summed.values(), strict=True):
            self.expert_load[name] = counts_E
            router.update_bias(counts_E, gamma)

    # ---- what only a strategy knows -----------------------------------------------------------

    def _over_replicas(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        strategy = self.trainer.strategy
        if isinstance(strategy, ReplicaAware):
            summed = {name: count.clone() for name, count in counts.items()}
            strategy.sum_over_replicas(summed)
            return summed
        if not counts:
            return {}
        names, stacked = list(counts), torch.stack(list(counts.values()))
        return dict(zip(names, cast(Tensor, strategy.reduce(stacked, reduce_op="sum")), strict=True))

    def _over_data_ranks(self, tokens: Tensor) -> Tensor:
        strategy = self.trainer.strategy
        if isinstance(strategy, ReplicaAware):
            return tokens  # of the global batch already
        return cast(Tensor, strategy.reduce(tokens.double(), reduce_op="sum"))

    def _gradient_norm(self) -> Tensor:
        strategy = self.trainer.strategy
        if isinstance(strategy, ReplicaAware):
            return strategy.gradient_norm()
        return nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    # ---- state --------------------------------------------------------------------------------

    @property
    def tokens_seen(self) -> float:
        """Labels trained on so far, over all ranks. Asking waits for the device."""
        return self._tokens.total()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["tokenizer_files"] = self.tokenizer_files

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._tokens = TokenCount(checkpoint.get("tokens_seen", 0.0))
        self.tokenizer_files = self.tokenizer_files or checkpoint.get("tokenizer_files", {})

    @override
    def cpu(self) -> Self:
        """Lightning calls it in the end, also where an error came before there were parameters to move."""
        return self if self._is_meta() else super().cpu()

    def _is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.parameters())

    def _seed(self) -> int:
        given = self.hparams["seed"]
        return given if given is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    def _mtp_loss_weight(self) -> float:
        weights = self.hparams["mtp_loss_weights"]
        if not weights:
            return self.config.mtp_loss_weight
        reached = [tokens for tokens in weights if tokens <= self.tokens_seen]
        return weights[max(reached)] if reached else self.config.mtp_loss_weight

    def _logs_now(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _total_steps(self) -> int | None:
        # estimated_stepping_batches builds the data loaders, and with them forgets where a resumed run stood
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if steps < math.inf else None
