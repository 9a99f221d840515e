"""What this library raises, by who has to act.

A message names the value that was given, the rule it breaks, and what would work.
"""

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DeadlockError",
    "MissingPackageError",
    "ScheduleError",
    "TrainingError",
]


class ConfigurationError(ValueError):
    """The user asked for something that cannot run. Lists every problem found, not only the first."""

    @classmethod
    def of(cls, what: str, problems: Sequence[str]) -> "ConfigurationError":
        """One error for several problems: ``what`` cannot run, and why, line by line."""
        return cls(f"{what}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class CheckpointError(RuntimeError):
    """A checkpoint cannot be trusted, or could not be written. Names the file; nothing was changed."""


class TrainingError(RuntimeError):
    """A guard has ended the run. Names the step and where the trouble is; the weights are those before that step."""


class ScheduleError(RuntimeError):
    """A schedule breaks its own rules: an action missing, doubled, or before what it needs."""


class DeadlockError(ScheduleError):
    """Every unfinished rank of a schedule waits for another one."""


class MissingPackageError(ImportError):
    """An optional package is needed for what was asked."""
