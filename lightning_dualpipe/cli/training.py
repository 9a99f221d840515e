"""``lightning-dualpipe fit | validate | test | predict``: a LightningCLI.

    lightning-dualpipe fit --config base.yaml --config over.yaml --trainer.strategy dualpipe --model.preset small

Model and data are ``DeepSeekV3`` and ``TextDataModule`` unless ``class_path`` names others; the strategy
is whatever the configuration says. The module brings its optimizer, because the parameters it is for
exist only when the strategy has cut the model.
"""

import logging
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero
from typing_extensions import override

from lightning_dualpipe.checkpoint.newest import newest_checkpoint
from lightning_dualpipe.cli.typos import what_was_meant
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["TrainingCLI", "train"]

_NEWEST = {"newest:": True, "newest-quick:": False}  # whether every byte is read


def train(args: Sequence[str] | None = None) -> None:
    """Run a command of the Trainer; ``args`` as in ``sys.argv[1:]``, which is what None means.

    Raises:
        ConfigurationError: what was asked for cannot run.
    """
    logging.getLogger(rank_zero.__name__).addFilter(_is_no_advertisement)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # in Lightning
    TrainingCLI(args=None if args is None else list(args))


class Parser(LightningArgumentParser):
    """Ends a long message with a short one."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error:  # not where one type of several is tried
            parser = getattr(ex, "subcommand_parser", self)
            options = {option.lstrip("-").rstrip("+") for option in parser._option_string_actions}
            if (meant := what_was_meant(message, sorted(options))) is not None:
                message = f"{message}\n\n{meant}"
        super().error(message, ex)


class TrainingCLI(LightningCLI):
    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},  # a run may go on in the folder of another
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "lightning-dualpipe"},
            parser_class=Parser,
            args=args,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_dualpipe.DeepSeekV3"},
                "data": {"class_path": "lightning_dualpipe.TextDataModule"},
            }
        )

    @override
    def before_instantiate_classes(self) -> None:
        """Lightning's own message for a misspelt strategy knows four names, none of them meant."""
        name, known = self._get(self.config, "trainer.strategy"), ["auto", *StrategyRegistry.available_strategies()]
        if isinstance(name, str) and name.lower() not in known:
            near = get_close_matches(name.lower(), known, n=3) or known
            raise ConfigurationError(f"trainer.strategy={name!r} is no strategy; did you mean {' or '.join(near)}?")

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise _refusal(error) or error from None

    def fit(self, **kwargs: Any) -> None:
        """``--ckpt_path newest:FOLDER`` goes on from what is there, if anything is: for runs that are started again.

        ``newest-quick:FOLDER`` leaves tensors to be checked when they are loaded.
        """
        path = str(kwargs.get("ckpt_path") or "")
        for prefix, thorough in _NEWEST.items():
            if path.startswith(prefix):
                folder = path.removeprefix(prefix)
                kwargs["ckpt_path"] = newest_checkpoint(folder, thorough=thorough)
                if kwargs["ckpt_path"] is None:  # as it should be once; or the name of the folder is misspelt
                    there = "" if Path(folder).is_dir() else ", which does not exist"
                    rank_zero.rank_zero_info(f"no checkpoint in {folder}{there}: beginning at step 0")
        self.trainer.fit(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Nobody is there to receive the logits of all batches: they are for callbacks, a batch at a time."""
        self.trainer.predict(**{**kwargs, "return_predictions": bool(kwargs.get("return_predictions"))})


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the folder of the logger. Without one, that would be where the user's may lie."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def _refusal(error: Exception) -> ConfigurationError | None:
    """The error of a constructor that jsonargparse tells of in the text of its own, at the level of each type."""
    if isinstance(error, ConfigurationError):
        return error
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for inner in frame.f_locals.get("exceptions", ()):
            if isinstance(inner, Exception) and (found := _refusal(inner)):
                return found
    return None


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Lightning recommends its cloud services at each start."""
    text = record.getMessage()
    return "litlogger" not in text and "litmodels" not in text
