"""``lightning-dualpipe fit | validate | test | predict``: a LightningCLI.

    lightning-dualpipe fit --config base.yaml --config over.yaml --trainer.strategy dualpipe --model.preset small

Model and data are ``DeepSeekV3`` and ``TextDataModule`` unless ``class_path`` names others; the strategy
is whatever the configuration says. The module brings its optimizer, because the parameters it is for
exist only when the strategy has cut the model.
"""

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero
from typing_extensions import override

__all__ = ["TrainingCLI", "train"]


def train(args: Sequence[str] | None = None) -> None:
    """Run a command of the Trainer; ``args`` as in ``sys.argv[1:]``, which is what None means."""
    logging.getLogger(rank_zero.__name__).addFilter(_is_no_advertisement)
    TrainingCLI(args=None if args is None else list(args))


class TrainingCLI(LightningCLI):
    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},  # without a logger, every run has the same folder
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "lightning-dualpipe"},
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

    def predict(self, **kwargs: Any) -> None:
        """Nobody is there to receive the logits of all batches: they are for callbacks, a batch at a time."""
        self.trainer.predict(**{**kwargs, "return_predictions": bool(kwargs.get("return_predictions"))})


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Lightning recommends its cloud services at each start."""
    text = record.getMessage()
    return "litlogger" not in text and "litmodels" not in text
