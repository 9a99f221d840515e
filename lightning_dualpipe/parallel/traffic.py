"""How much a dispatch sends, and what it would have sent with one row for every chosen expert."""

from __future__ import annotations

from dataclasses import astuple, dataclass

__all__ = ["Traffic"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Rows that leave a rank for another one. A combine sends as many in the other direction.

    A copy carries the token's hidden state and all its weights and experts, a row the hidden state and one weight.
    """

    across_nodes: int = 0  # copies to other nodes
    within_nodes: int = 0  # copies to other ranks of the node, those that are passed on included
    rows_across_nodes: int = 0  # one per (token, expert on another node)
    rows_within_nodes: int = 0  # one per (token, expert on another rank of the node)
    bytes_across_nodes: int = 0  # of those copies
    bytes_of_rows_across_nodes: int = 0  # of those rows

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    @property
    def saved_across_nodes(self) -> float:
        """Share of the bytes between nodes that nobody had to send."""
        rows = self.bytes_of_rows_across_nodes
        return 1 - self.bytes_across_nodes / rows if rows else 0.0
