"""The command ``lightning-dualpipe``.

    fit validate test predict     the Trainer's methods, as a LightningCLI           cli.training
    draw                          a schedule over time, as text, picture or trace    cli.drawing
    plan                          what layouts of a model cost on a cluster          cli.planning
    generate                      continue a text with a trained model               cli.generating
    export                        a Hugging Face directory of a checkpoint           cli.exporting
    import                        a checkpoint of a Hugging Face directory           cli.importing
    consolidate verify            checkpoint directories                             cli.checkpoints

This file only finds out what was asked for: ``--help``, ``draw`` and ``plan`` need neither torch nor
lightning, whose import takes seconds. It is also where a run ends that cannot work: a ConfigurationError was
written for the person at the keyboard, who has no use for a traceback of this library.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches

from lightning_dualpipe import __version__
from lightning_dualpipe.errors import CheckpointError, ConfigurationError, MissingPackageError

__all__ = ["main"]

_TRAINER_COMMANDS = {
    "fit": "train a model",
    "validate": "one pass over the validation data",
    "test": "one pass over the test data",
    "predict": "run the model on data without labels",
}
_COMMANDS = {
    **_TRAINER_COMMANDS,
    "draw": "show a pipeline schedule as text, or write a picture or a trace of it",
    "generate": "continue a text with a trained model",
    "plan": "price the layouts of a model on a cluster: time, memory, what does not fit",
    "export": "make a Hugging Face directory of a checkpoint, for transformers and servers",
    "import": "make a checkpoint of a Hugging Face directory",
    "consolidate": "make one file of a checkpoint directory, for strategies that know files only",
    "verify": "read every byte of checkpoint directories, and check it",
}

_HELP = """\
usage: lightning-dualpipe [--help] [--version] COMMAND [OPTION ...]

Train DeepSeek-V3 and its like with pipeline and expert parallelism.

commands:
{commands}

examples:
  lightning-dualpipe fit --config examples/quickstart.yaml
  lightning-dualpipe fit --config examples/quickstart.yaml --trainer.max_steps 100 --model.preset small
  lightning-dualpipe validate --config examples/quickstart.yaml --ckpt_path last.ckpt
  lightning-dualpipe generate --checkpoint last.ckpt --prompt "import os" --speculate 2 --stream
  lightning-dualpipe export last.ckpt served/ --dtype float8_block
  lightning-dualpipe draw --schedule dualpipe --ranks 4 --microbatches 8 --output schedule.svg
  lightning-dualpipe plan --preset 671b --gpus 2048 --gpu h800

'lightning-dualpipe COMMAND --help' lists the options of a command.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 2 where the request cannot work, 1 where no layout that was planned fits.

    ``args`` as in ``sys.argv[1:]``.
    """
    given = list(sys.argv[1:] if args is None else args)
    first = given[0] if given else "--help"
    try:
        if first in ("-h", "--help"):
            sys.stdout.write(_HELP.format(commands=_listed(_COMMANDS)))
        elif first == "--version":
            sys.stdout.write(f"lightning-dualpipe {__version__}\n")
        elif first == "draw":
            from lightning_dualpipe.cli.drawing import draw

            draw(given[1:])
        elif first == "plan":
            from lightning_dualpipe.cli.planning import plan

            return plan(given[1:])
        elif first == "generate":
            from lightning_dualpipe.cli.generating import generate

            generate(given[1:])
        elif first == "export":
            from lightning_dualpipe.cli.exporting import export

            export(given[1:])
        elif first == "import":
            from lightning_dualpipe.cli.importing import import_

            import_(given[1:])
        elif first in ("consolidate", "verify"):
            from lightning_dualpipe.cli import checkpoints

            getattr(checkpoints, first)(given[1:])
        elif first in _TRAINER_COMMANDS or first.startswith("-"):
            from lightning_dualpipe.cli.training import train

            train(None if args is None else given)
        else:
            raise ConfigurationError(_unknown(first))
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        _explain(reason)
        return 2
    return 0


def _listed(commands: dict[str, str]) -> str:
    return "\n".join(f"  {name:12}{what}" for name, what in commands.items())


def _unknown(command: str) -> str:
    near = get_close_matches(command, _COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(_COMMANDS)}"
    return f"there is no command {command!r}; {hint}"


def _reason(error: BaseException | None) -> Exception | None:
    """The error that was meant for the user; cleaning up after it may have raised others."""
    while error is not None:
        if isinstance(error, CheckpointError | ConfigurationError | MissingPackageError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _explain(error: Exception) -> None:
    if not _launcher_will_tell(error):
        lines = [str(error), *getattr(error, "__notes__", ())]
        sys.stderr.write("lightning-dualpipe: error: " + "\n".join(lines) + "\n")


def _launcher_will_tell(error: Exception) -> bool:
    """Where this package started the ranks, the main process prints the first cause, once, when all are gone."""
    if "lightning_dualpipe.strategy.launcher" not in sys.modules:  # so it has started none
        return False
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lightning_dualpipe.strategy.failures import LocalRun, report_failure

    if LocalRun.joined() is None:
        return False
    report_failure(error, rank=getattr(rank_zero_only, "rank", 0))  # in case it was raised outside of the Trainer
    return True
