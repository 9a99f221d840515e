"""Where a token has to go: how many nodes and how many processors its experts are on.

With node-limited routing (arXiv:2412.19437, section 2.1.2) a token chooses ``k`` experts among those of ``g`` out of
``G`` groups. Experts lie in order on the expert ranks, so groups are nodes, or parts or unions of them. Deduplicated
dispatch sends a token once to each node and hands it on there. If every choice is equally likely, a place that holds
``m`` groups, ``e`` experts of each, is needed with probability

    P = Σ_j  C(m, j) C(G - m, g - j) / C(G, g)  x  (1 - C(S - j e, k) / C(S, k))        S = g x experts per group
"""

from dataclasses import dataclass
from math import comb

from lightning_dualpipe.planner.hardware import Hardware
from lightning_dualpipe.planner.model import ModelShape

__all__ = ["Journey", "journey", "places_of_a_token"]


@dataclass(frozen=True, slots=True)
class Journey:
    """Copies of an average token that leave a processor."""

    nodes: float  # over the network: other nodes
    ranks: float  # to other processors, in whichever node

    def seconds(self, num_bytes: float, tokens: float, hardware: Hardware) -> float:
        """One all-to-all of ``num_bytes`` a row: the slower link, and the handling of every row."""
        links = max(self.nodes / hardware.network, self.ranks / hardware.nvlink)
        return tokens * (num_bytes * links + self.ranks * hardware.seconds_per_row)


def journey(model: ModelShape, expert_parallel: int, hardware: Hardware) -> Journey:
    """Expert ranks are neighbours, so a node holds as many of them as it has processors."""
    nodes = max(1, expert_parallel // hardware.per_node)
    return Journey(
        nodes=places_of_a_token(model, nodes) * (nodes - 1) / nodes,
        ranks=places_of_a_token(model, expert_parallel) * (expert_parallel - 1) / expert_parallel,
    )


def places_of_a_token(model: ModelShape, places: int) -> float:
    """Expected number of places, of equally many experts each, that a token has experts on."""
    groups, chosen, k = model.num_groups, model.groups_per_token, model.experts_per_token
    if places % groups and groups % places:  # places and groups cut each other: then count without groups
        groups = chosen = 1
    per_group = model.num_experts // groups
    held = max(1, groups // places)  # groups, or parts of one, at a place
    experts = min(per_group, model.num_experts // places)  # of each, at a place
    selectable = chosen * per_group
    needed = sum(
        comb(held, count)
        * comb(groups - held, chosen - count)
        / comb(groups, chosen)
        * (1 - comb(selectable - count * experts, k) / comb(selectable, k))
        for count in range(1, min(held, chosen) + 1)
        if chosen - count <= groups - held
    )
    return places * needed
