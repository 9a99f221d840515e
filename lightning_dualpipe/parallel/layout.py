"""How the ranks of a run are divided: arithmetic only.

    rank = pipeline rank * data + data rank              data = world / pipeline
    data rank = expert-data rank * expert + expert rank

For world 8, pipeline 2, expert 2, the ranks of one pipeline stand in a column:

                              data rank   0  1  2  3
    pipeline rank 0                rank   0  1  2  3      data group {0 1 2 3}, expert groups {0 1} {2 3}
    pipeline rank 1                rank   4  5  6  7      data group {4 5 6 7}, expert groups {4 5} {6 7}

Data ranks are neighbours because expert parallelism talks most, and neighbours share a node. Experts
are spread over data ranks: each rank of an expert group reads its own data and holds its own share
of every layer's experts, so expert parallelism costs no further processes.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from lightning_dualpipe.errors import ConfigurationError

__all__ = ["ParallelLayout"]


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes. ``check()`` them before use: everything else assumes that they divide."""

    world: int
    _: KW_ONLY
    pipeline: int = 1
    expert: int = 1
    per_node: int | None = None  # neighbouring ranks that share a node; None: all of them

    @property
    def data(self) -> int:
        """Number of pipelines, each of which reads its own data."""
        return self.world // self.pipeline

    @property
    def expert_data(self) -> int:
        """Number of expert groups at one pipeline rank: copies of each expert."""
        return self.data // self.expert

    @property
    def expert_nodes(self) -> int | None:
        """Nodes that an expert group spans, with equally many of its ranks on each; None if that cannot be said."""
        per_node = self.per_node or self.world
        if per_node % self.expert == 0:  # an expert group starts at a multiple of its size
            return 1
        return self.expert // per_node if self.expert % per_node == 0 else None

    def check(self, *, num_experts: int | None = None) -> None:
        """Raise one ``ConfigurationError`` that names everything wrong with these sizes."""
        if problems := self.problems(num_experts=num_experts):
            raise ConfigurationError.of("this parallel layout cannot run", problems)

    def problems(self, *, num_experts: int | None = None) -> list[str]:
        """Why these sizes cannot be, line by line; empty if they can."""
        sizes = {"the number of processes": self.world, _PIPELINE: self.pipeline, _EXPERT: self.expert}
        small = [f"{name} is {size}, it must be at least 1" for name, size in sizes.items() if size < 1]
        return small or [*self._indivisible_ranks(), *self._indivisible_experts(num_experts)]

    def rank(self, *, pipeline: int, data: int) -> int:
        assert 0 <= pipeline < self.pipeline and 0 <= data < self.data, f"({pipeline}, {data}) in {self}"
        return pipeline * self.data + data

    def pipeline_rank(self, rank: int) -> int:
        return rank // self.data

    def data_rank(self, rank: int) -> int:
        return rank % self.data

    def expert_rank(self, rank: int) -> int:
        """Ranks with equal expert rank hold the same experts of their layers."""
        return rank % self.expert  # expert divides data

    def expert_data_rank(self, rank: int) -> int:
        return self.data_rank(rank) // self.expert

    def pipeline_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's pipeline, first stage first."""
        return tuple(range(self.data_rank(rank), self.world, self.data))

    def data_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks at this rank's place in their pipelines: they hold the same layers."""
        first = rank - self.data_rank(rank)
        return tuple(range(first, first + self.data))

    def expert_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that together hold each expert of their layers once."""
        first = rank - self.expert_rank(rank)
        return tuple(range(first, first + self.expert))

    def expert_ranks_within(self, rank: int) -> tuple[int, ...]:
        """Of its expert ranks, those on the node of ``rank``."""
        within = self.expert // (self.expert_nodes or 1)
        first = rank - rank % within
        return tuple(range(first, first + within))

    def expert_ranks_across(self, rank: int) -> tuple[int, ...]:
        """Of its expert ranks, one on each node: those with the place that ``rank`` has on its own."""
        within = self.expert // (self.expert_nodes or 1)
        return self.expert_ranks(rank)[rank % within :: within]

    def expert_data_ranks(self, rank: int) -> tuple[int, ...]:
        """The data ranks that hold the same experts."""
        return self.data_ranks(rank)[self.expert_rank(rank) :: self.expert]

    def _indivisible_ranks(self) -> list[str]:
        if self.world % self.pipeline:
            return [
                f"{_PIPELINE}={self.pipeline} does not divide the {self.world} processes of this run; "
                f"use one of {_divisors(self.world)}, or a multiple of {self.pipeline} processes"
            ]
        if self.data % self.expert:
            return [
                f"{_EXPERT}={self.expert} does not divide the {self.data} data ranks that experts are spread over "
                f"({self.world} processes / {_PIPELINE}={self.pipeline}); use one of {_divisors(self.data)}"
            ]
        return []

    def _indivisible_experts(self, num_experts: int | None) -> list[str]:
        if num_experts is None or num_experts % self.expert == 0:
            return []
        return [
            f"{_EXPERT}={self.expert} does not divide the model's {num_experts} routed experts; "
            f"use one of {_divisors(num_experts)}"
        ]


_PIPELINE = "pipeline_parallel_size"
_EXPERT = "expert_parallel_size"


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
