"""What went wrong on some rank while all saved or loaded together."""

from torch.distributed.checkpoint import CheckpointException

__all__ = ["first_failure"]


def first_failure(error: BaseException) -> BaseException:
    """The cause of the lowest rank that failed, on every rank: there it is clear without the others' tracebacks."""
    if not isinstance(error, CheckpointException) or not error.failures:
        return error
    cause = error.failures[min(error.failures)][0]
    return first_failure(cause)
