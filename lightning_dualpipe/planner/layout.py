"""How the processors of a run can be divided, and which divisions cannot be.

gpus = pipeline x data        expert divides data        microbatches = batch / data / sequences of one
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from lightning_dualpipe.schedules.action import Placement

__all__ = ["Layout", "divisors", "layouts"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes that divide each other."""

    gpus: int
    pipeline: int
    expert: int
    schedule: str
    sequences: int  # of one microbatch
    num_microbatches: int  # of one pipeline in one step

    @property
    def data(self) -> int:
        return self.gpus // self.pipeline

    @property
    def copies(self) -> int:
        """How many ranks of one pipeline hold a stage."""
        return 2 if self.schedule == "dualpipe" else 1

    @property
    def num_stages(self) -> int:
        return self.pipeline * (2 if self.schedule == "dualpipev" else 1)

    @property
    def replicas(self) -> int:
        """Ranks with the same parameters, routed experts apart."""
        return self.copies * self.data

    @property
    def expert_replicas(self) -> int:
        return self.copies * self.data // self.expert

    @property
    def placement(self) -> Placement:
        match self.schedule:
            case "dualpipe":
                return Placement.bidirectional(self.pipeline)
            case "dualpipev":
                return Placement.v(self.pipeline)
        return Placement.line(self.pipeline)

    def __str__(self) -> str:
        return f"{self.schedule} pipeline {self.pipeline} expert {self.expert} microbatch {self.sequences}"


def divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def layouts(
    *,
    gpus: int,
    batch_sequences: int,
    num_experts: int,
    num_pieces: int,
    schedules: tuple[str, ...],
    pipelines: tuple[int, ...],
    experts: tuple[int, ...],
    sequences: tuple[int, ...],
) -> Iterator[Layout | str]:
    """Every layout of these sizes, and for those that cannot be, why, once for all that share the reason.

    Empty ``pipelines``, ``experts`` or ``sequences``: every size there is.
    """
    for pipeline in pipelines or [size for size in divisors(gpus) if size <= num_pieces]:
        data = gpus // pipeline
        if gpus % pipeline:
            yield f"pipeline {pipeline} does not divide {gpus} GPUs"
            continue
        if batch_sequences % data:
            yield f"pipeline {pipeline}: {data} pipelines do not divide a batch of {batch_sequences} sequences"
            continue
        share = batch_sequences // data
        possible = divisors(gcd(data, num_experts) if num_experts else 1)
        for expert in experts or possible:
            if expert not in possible:
                yield f"expert {expert} must divide {data} data ranks (pipeline {pipeline}) and {num_experts} experts"
                continue
            for schedule in schedules:
                if reason := _unfit(schedule, pipeline, num_pieces):
                    yield reason
                    continue
                for count in sequences or [size for size in (1, 2, 4, 8) if share % size == 0]:
                    if share % count:
                        yield f"microbatches of {count} do not divide the {share} sequences of a pipeline of {pipeline}"
                        continue
                    yield Layout(gpus, pipeline, expert, schedule, count, share // count)


def _unfit(schedule: str, pipeline: int, num_pieces: int) -> str | None:
    stages = 2 * pipeline if schedule == "dualpipev" else pipeline
    if schedule == "dualpipe" and pipeline % 2:
        return f"dualpipe mirrors one half of the ranks onto the other, and pipeline {pipeline} is odd"
    if stages > num_pieces:
        return f"{schedule} on pipeline {pipeline} has {stages} stages, the model {num_pieces} layers to share out"
    return None
