"""Sequences that were filled up to one length: ``attention_mask`` [B, T], 1 for a token, 0 for padding.

    a b c . .      1 1 1 0 0
    d e f g h      1 1 1 1 1      padding is on the right, where causal attention never sees it

So the logits of tokens are those without padding, and the mask is for what counts tokens: the load of
the experts, the balance loss, and the losses.
"""

from torch import Tensor

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Batch

__all__ = ["MASK", "ahead", "check_padding"]

MASK = "attention_mask"


def check_padding(batch: Batch) -> None:
    """Of a batch on the CPU: to look at one on a GPU would wait for it.

    Raises:
        ConfigurationError: there is a mask that does anything but fill up sequences on the right.
    """
    mask, tokens = batch.get(MASK), batch.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor) or mask.device.type != "cpu":
        return
    if mask.shape != tokens.shape:
        wrong = f"of shape {list(mask.shape)} for input_ids {list(tokens.shape)}"
    elif ((mask != 0) & (mask != 1)).any():
        wrong = "with values other than 0 and 1"
    elif ((mask[:, 1:] != 0) & (mask[:, :-1] == 0)).any():
        wrong = "with tokens after padding"
    else:
        return
    raise ConfigurationError(
        f"attention_mask {wrong} is not supported: it is [B, T], 1 for tokens and 0 for padding, and padding is on "
        "the right; move padding there (padding_side='right'), or leave the mask out"
    )


def ahead(batch: Batch, depth: int) -> Batch:
    """What a depth of multi-token prediction needs of a batch: its position i is real where token i + depth is."""
    return {MASK: batch[MASK][:, depth:]} if MASK in batch else {}
