"""What a rank executes: the steps of a schedule with the messages between them.

    rank 1: {0F0<0} 1F0 {1F0>2 2F4<2} 2F4 …

A *message* carries the output of a step to the rank that consumes it: ``0F0>1`` sends the activation
of stage 0 to rank 1, ``2B4<2`` receives the input gradient of stage 2 from rank 2. An *exchange*,
in braces, is the messages of a rank that are posted together between two steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_dualpipe.schedules.action import Action, Kind, Step, format_step

__all__ = ["Compute", "Exchange", "Instruction", "Message", "Program", "format_programs"]


@dataclass(frozen=True, slots=True)
class Message:
    """The output of a stage on its way to a neighbouring stage on another rank."""

    kind: Kind  # FORWARD: an activation for the next stage; BACKWARD: an input gradient for the one before
    source_stage: int
    target_stage: int
    microbatch: int
    source_rank: int
    target_rank: int
    tag: int  # no other message of the schedule has it; from 0 up to twice the stages x microbatches

    @property
    def output(self) -> Action:
        """The action whose output this is; ``B`` stands for ``I`` too."""
        return Action(self.source_stage, self.kind, self.microbatch)

    def __str__(self) -> str:
        return f"{self.output} from rank {self.source_rank} to rank {self.target_rank}"


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a step; all it consumes is there."""

    step: Step

    def __str__(self) -> str:
        return format_step(self.step)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Post these messages at once; both ends have them in this order."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.sends + self.receives

    def __str__(self) -> str:
        sends = [f"{message.output}>{message.target_rank}" for message in self.sends]
        receives = [f"{message.output}<{message.source_rank}" for message in self.receives]
        return f"{{{' '.join(sends + receives)}}}"


Instruction = Compute | Exchange


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of one rank, in order."""

    rank: int
    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        return f"rank {self.rank}: {' '.join(map(str, self.instructions))}"


def format_programs(programs: Iterable[Program]) -> str:
    """One line per rank."""
    return "".join(f"{program}\n" for program in programs)
