"""Sequences that were filled up to one length: ``attention_mask`` [B, T], 1 for a token, 0 for padding.

    a b c . .      1 1 1 0 0
    d e f g h      1 1 1 1 1      padding is on the right, where causal attention never sees it

So the logits of tokens are those without padding, and the mask is for what counts tokens: the load of
the experts, the balance loss, and the losses.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Batch

__all__ = ["MASK", "PaddingCheck", "ahead"]

MASK = "attention_mask"

_RULES = ("with values other than 0 and 1", "with tokens after padding")


class PaddingCheck:
    """Refuses masks that do anything but fill up sequences on the right.

    To look at a mask on a GPU would wait for it. The GPU is only told to look, and its answer is read
    when it has arrived: at a later batch, or where somebody has waited for the device anyway.
    """

    def __init__(self) -> None:
        self._asked: deque[_Answer] = deque()

    def __call__(self, batch: Batch) -> None:
        """
        Raises:
            ConfigurationError: of this batch, or of an earlier one, whose answer has arrived.
        """
        self.collect()
        mask, tokens = batch.get(MASK), batch.get("input_ids")
        if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor):
            return
        if mask.shape != tokens.shape:
            raise _refusal(f"of shape {list(mask.shape)} for input_ids {list(tokens.shape)}")
        if mask.device.type == "cpu":
            _refuse(_broken(mask), when="")
        elif _answers_later(mask):
            self._asked.append(_Answer(mask))

    def collect(self, *, wait: bool = False) -> None:
        """Read the answers that are there; or wait for all."""
        while self._asked and (wait or self._asked[0].is_there()):
            answer = self._asked.popleft()
            _refuse(answer.read(), when=" in a batch before (a GPU is asked without waiting for its answer)")

    def __reduce__(self) -> tuple[Callable[[], "PaddingCheck"], tuple[()]]:
        """Of copies of a model each has its own questions."""
        return PaddingCheck, ()


class _Answer:
    """What a GPU finds in a mask, on its way to the host behind all that is queued."""

    def __init__(self, mask: Tensor) -> None:
        self._found = torch.empty(len(_RULES), dtype=torch.bool, pin_memory=True)
        self._found.copy_(_broken(mask), non_blocking=True)
        self._arrival = torch.cuda.current_stream(mask.device).record_event()

    def is_there(self) -> bool:
        return self._arrival.query()

    def read(self) -> Tensor:
        self._arrival.synchronize()
        return self._found


def _answers_later(mask: Tensor) -> bool:
    return mask.is_cuda


def _broken(mask_BT: Tensor) -> Tensor:
    """Of each rule whether it is."""
    others = ((mask_BT != 0) & (mask_BT != 1)).any()
    return torch.stack([others, ((mask_BT[:, 1:] != 0) & (mask_BT[:, :-1] == 0)).any()])


def _refuse(broken: Tensor, *, when: str) -> None:
    for rule, is_broken in zip(_RULES, broken.tolist(), strict=True):
        if is_broken:
            raise _refusal(rule + when)


def _refusal(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"attention_mask {what} is not supported: it is [B, T], 1 for tokens and 0 for padding, and padding is on "
        "the right; move padding there (padding_side='right'), or leave the mask out"
    )


def ahead(batch: Batch, depth: int) -> Batch:
    """What a depth of multi-token prediction needs of a batch: its position i is real where token i + depth is."""
    return {MASK: batch[MASK][:, depth:]} if MASK in batch else {}
