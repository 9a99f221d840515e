"""``from_pretrained`` and ``save_pretrained``, as methods of the LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

from lightning_dualpipe.deepseek_v3.config import ConfigOverrides, DeepSeekV3Config, Preset
from lightning_dualpipe.deepseek_v3.convert import read_pretrained_config
from lightning_dualpipe.deepseek_v3.data_contract import TokenIds, check_token_ids
from lightning_dualpipe.deepseek_v3.hf_names import Part, parts_of
from lightning_dualpipe.deepseek_v3.hf_tokenizer import read_tokenizer_files, served_tokenizer_files
from lightning_dualpipe.deepseek_v3.hf_writer import FileDtype, save_together
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import ReplicaAware

__all__ = ["Pretrained", "configuration"]


def configuration(
    preset: Preset | None,
    overrides: ConfigOverrides | None,
    config: DeepSeekV3Config | None,
    pretrained: str | Path | None,
) -> DeepSeekV3Config:
    """What the arguments of ``DeepSeekV3`` describe.

    Raises:
        ConfigurationError: they contradict each other, or ``pretrained`` is no model.
    """
    if config is not None and (preset is not None or overrides is not None or pretrained is not None):
        raise ConfigurationError(
            f"preset={preset!r}, overrides={overrides!r} and pretrained={pretrained!r} have no effect beside config, a "
            "whole configuration: vary that by config.with_overrides(…), or leave it out"
        )
    if pretrained is not None and preset is not None:
        raise ConfigurationError(
            f"preset={preset!r} has no effect beside pretrained={str(pretrained)!r}, whose config.json says what the "
            "model is: leave one of them out"
        )
    if config is not None:
        return config
    if pretrained is not None:
        return read_pretrained_config(pretrained).with_overrides(**(overrides or {}))
    return DeepSeekV3Config.from_preset(preset or "tiny", **(overrides or {}))


class Pretrained:
    """For a module that is made with ``pretrained=`` and has a ``config``, a ``model`` and a ``configure_model``."""

    config: DeepSeekV3Config
    model: Transformer
    hparams: Any
    configure_model: Callable[[], None]
    _trainer: Any
    tokenizer_files: dict[str, str]
    """Text by name, any of ``interface.TOKENIZER_FILES``, of the tokenizer that the model was trained with."""

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        overrides: ConfigOverrides | None = None,
        materialize: bool = True,
        **settings: Any,
    ) -> Self:
        """A module with the weights of a Hugging Face directory.

        Args:
            directory: with ``config.json`` and safetensors files.
            overrides: fields of the configuration that are to differ from ``config.json``.
            materialize: False leaves the weights in their files until a Trainer has cut the model, so that
                every rank reads only its part: for models larger than the memory of one process.
            settings: arguments of the constructor other than the configuration.
        """
        module: Self = cast(Any, cls)(pretrained=directory, overrides=overrides, **settings)
        module.tokenizer_files = read_tokenizer_files(Path(directory))
        if materialize:
            module.configure_model()
        return module

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        dtype: FileDtype = "bfloat16",
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        token_ids: TokenIds | None = None,
    ) -> None:
        """Write a Hugging Face directory that transformers and serving engines read.

        ``dtype="float8_block"`` writes the format of DeepSeek's release: FP8 in blocks of 128 x 128, the rest bfloat16.

        With several ranks all of them call this. Rank 0 writes, and all return when the directory is complete, or
        raise what kept rank 0 from writing. ``token_ids`` are by default those of the data the model was trained on;
        where these say nothing, those it was imported with. The tokenizer's files are written too, where it is known.
        """
        self.configure_model()
        token_ids = self.hparams["token_ids"] if token_ids is None else token_ids
        check_token_ids(token_ids or {})
        strategy = self._trainer.strategy if self._trainer is not None else None
        longest = self.config.max_position_embeddings
        parts = iter(parts_of(self.model))
        if isinstance(strategy, ReplicaAware):
            parts = (
                Part(name.removeprefix("model."), tensor, rows.start if rows is not None else 0)
                for name, rows, tensor in strategy.whole_tensors()
            )
        save_together(
            parts,
            self.config,
            directory,
            writes=strategy is None or strategy.is_global_zero,
            agree=lambda problem: problem if strategy is None else strategy.broadcast(problem),
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            token_ids=token_ids,
            texts=served_tokenizer_files(self.tokenizer_files, token_ids or {}, longest=longest),
        )
