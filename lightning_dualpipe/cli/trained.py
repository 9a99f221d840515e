"""What a training left behind, opened for a command that needs its weights and nothing of its optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dualpipe.checkpoint.directory import is_directory
from lightning_dualpipe.checkpoint.single_file import UNREADABLE, not_whole
from lightning_dualpipe.checkpoint.stored import Stored, StoredTensor, open_stored, read
from lightning_dualpipe.deepseek_v3.module import DeepSeekV3
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["Trained", "open_trained"]


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A checkpoint of ``DeepSeekV3``, a file or a directory, of which no weight is in memory yet.

    Args:
        module: as it was made, on the meta device.
        tokenizer_files: text by name, of the tokenizer that it was trained with; none if the checkpoint does not say.
        weights: its state dict. Of a file they are mapped, of a directory they are StoredTensors.
    """

    path: Path
    module: DeepSeekV3
    tokenizer_files: Mapping[str, str]
    weights: Mapping[str, Any]
    stored: Stored | None

    def read(self, wanted: Sequence[Any]) -> list[Tensor]:
        """Weights, or slices of them; those of a directory are checked.

        Raises:
            CheckpointError: a block is not as it was written.
        """
        if self.stored is None:
            return list(wanted)
        found: list[Tensor] = read(list(wanted), self.stored, None)
        return found

    def filled(self) -> DeepSeekV3:
        """The module with its weights, all of them in memory, and its tokenizer."""
        self.module.tokenizer_files = dict(self.tokenizer_files)
        self.module.configure_model()
        self.module.load_state_dict(dict(zip(self.weights, self.read(list(self.weights.values())), strict=True)))
        return self.module


def open_trained(path: Path) -> Trained:
    """Nothing in the checkpoint is run, and states of optimizers are not read.

    Raises:
        CheckpointError: a file or a directory that is no checkpoint, is not whole, or would run code.
        ConfigurationError: no checkpoint of ``DeepSeekV3``, or weights that are not those of its configuration.
    """
    stored, content = None, None
    if is_directory(path):
        if (path / "config.json").exists():
            raise ConfigurationError(f"{path} is a Hugging Face directory of safetensors, not a checkpoint")
        stored = open_stored(path)
        content = stored.checkpoint()
    else:
        content = _file(path)
    settings = content.get("hyper_parameters") if isinstance(content, dict) else None
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or "overrides" not in settings or not isinstance(weights, dict):
        raise ConfigurationError(
            f"{path} is no checkpoint of lightning_dualpipe.DeepSeekV3: it has no hyper_parameters of one; give a "
            ".ckpt that a Trainer saved of it"
        )
    settings = {name: value for name, value in settings.items() if name != "_instantiator"}
    try:
        module = DeepSeekV3(**settings)
    except TypeError as error:
        raise ConfigurationError(f"{path} has hyper_parameters that DeepSeekV3 does not take: {error}") from None
    if problems := _problems(module, weights):
        raise ConfigurationError.of(f"the weights in {path} are not those of its configuration", problems)
    return Trained(path, module, content.get("tokenizer_files") or {}, weights, stored)


def _file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigurationError(f"{path} does not exist") from None
    except UNREADABLE as error:
        raise not_whole(path, error) from None


def _problems(module: DeepSeekV3, weights: Mapping[str, Any]) -> list[str]:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    held = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor | StoredTensor)}
    wrong = {
        "missing": [name for name in expected if name not in held],
        "unknown": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} is {list(held[name].shape)} and should be {list(shape)}"
            for name, shape in expected.items()
            if name in held and tuple(held[name].shape) != shape
        ],
    }
    return [
        f"{len(names)} {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        for what, names in wrong.items()
        if names
    ]
