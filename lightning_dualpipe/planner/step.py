"""How long the pipeline of one step runs: closed forms, since simulating 100,000 ranks is no plan.

    1F1B, GPipe     Σ (F + B)                    +  (M - 1) max (F + B)
    ZB1P            Σ (F + I - min(F, I, W))     +  M max (F + I + W)           Σ without the slowest stage
    DualPipe(V)     n max F&B  +  lone  +  bubble                               n = M - S - 1 pairs, S stages

Sums and maxima are over stages: a microbatch visits each one once on the way there and back, and the
slowest stage, which the others wait for, does all M. In DualPipe the ranks in the middle have the
most pairs, n, and M - n lone forwards and backwards, S - 1 of these split; they wait, with h = S/2 - 1,

    h (F&B + B - 3W) + h max(F - I, 0) + h max(W - I, 0) - min(F, h max(I - F, 0)) + 2h max(B - F&B, 0)

where F, B, W are means over the stages, but pairs go at the pace of the slowest rank, whose two stages are a stage
and its mirror image. With equal stages these are exact where tests/schedules/test_simulate.py says; how near
they are elsewhere, tests/planner/test_step.py. DualPipeV on P ranks with M microbatches is one half of a DualPipe
of 2P ranks with 2M. Where there are fewer microbatches than a schedule has room for, it is simulated.

A message takes ``send`` from one rank to the next, and the first microbatch waits for one per stage, there
and back. Afterwards a rank of a 1F1B pipeline waits for its neighbour twice a microbatch, one of ZB1P computes
weight gradients instead, and one that runs pairs sends from inside of them.
"""

from collections.abc import Sequence

from lightning_dualpipe.planner.overlap import StageTimes
from lightning_dualpipe.schedules import Costs, build_schedule, simulate

__all__ = ["held_microbatches", "num_pairs", "pipeline_seconds"]

_SIMULATED = 512  # forwards; beyond, so few microbatches would leave the ranks idle most of the time anyway


def pipeline_seconds(
    schedule: str, num_microbatches: int, stages: Sequence[StageTimes], pairs: Sequence[float], send: float
) -> float:
    """
    Args:
        pairs: mean time of an overlapped pair on each rank, for the schedules that have pairs.
    """
    count, last = len(stages), num_microbatches - 1
    if _has_room(schedule, num_microbatches, count) and count * num_microbatches <= _SIMULATED:
        return _simulated(schedule, num_microbatches, stages, pairs, send)
    match schedule:
        case "dualpipe":
            even = num_microbatches + num_microbatches % 2  # one direction's last microbatch runs without a partner
            return _both_ways(even, stages, pairs) + 2 * (count - 1) * send
        case "dualpipev":
            return _both_ways(2 * num_microbatches, stages, pairs) + 2 * (count - 1) * send
        case "zb1p":
            work = [stage.forward + stage.backward_input + stage.backward_weight for stage in stages]
            fill = [stage.forward + stage.backward_input - min(_parts(stage)) for stage in stages]
            slowest = work.index(max(work))
            return num_microbatches * work[slowest] + sum(fill) - fill[slowest] + 4 * (count - 1) * send
    there_and_back = [stage.forward + stage.backward for stage in stages]
    waits = 2 * (count - 1 + (last if schedule == "1f1b" and count > 1 else 0)) * send
    return sum(there_and_back) + last * max(there_and_back) + waits


def num_pairs(schedule: str, num_microbatches: int, num_stages: int) -> int:
    """Overlapped pairs on the ranks that have the most of them; a stage of a DualPipeV counts as half a pair."""
    turns = {"dualpipe": num_microbatches, "dualpipev": 2 * num_microbatches}.get(schedule, 0)
    return max(0, turns - num_stages - 1)


def _both_ways(turns: int, stages: Sequence[StageTimes], pairs: Sequence[float]) -> float:
    count = len(stages)
    n = num_pairs("dualpipe", turns, count)
    forward, input_, weight = (sum(values) / count for values in zip(*map(_parts, stages), strict=True))
    backward = sum(stage.backward for stage in stages) / count
    pair, whole, h = sum(pairs) / len(pairs), input_ + weight, count / 2 - 1
    split = min(turns - n, count - 1)
    lone = (turns - n) * forward + split * whole + (turns - n - split) * backward
    bubble = h * (pair + whole - 3 * weight) + h * max(forward - input_, 0) + h * max(weight - input_, 0)
    bubble += 2 * h * max(whole - pair, 0) - min(forward, h * max(input_ - forward, 0))
    return n * max(pairs) + lone + max(bubble, 0.0)


def _parts(stage: StageTimes) -> tuple[float, float, float]:
    return stage.forward, stage.backward_input, stage.backward_weight


def _has_room(schedule: str, num_microbatches: int, num_stages: int) -> bool:
    """Whether the schedule was made for more microbatches than there are."""
    fits = {"dualpipe": 2 * num_stages, "dualpipev": num_stages, "zb1p": num_stages}
    return num_microbatches < fits.get(schedule, 0)


def _simulated(
    schedule: str, num_microbatches: int, stages: Sequence[StageTimes], pairs: Sequence[float], send: float
) -> float:
    forward, input_, weight = zip(*map(_parts, stages), strict=True)
    # The two stages of a rank share the time of their pair.
    overlapped = (*pairs, *reversed(pairs))[: len(stages)] if pairs else None
    ranks = len(stages) // 2 if schedule == "dualpipev" else len(stages)
    return simulate(
        build_schedule(schedule, ranks, num_microbatches), Costs(forward, input_, weight, overlapped, send)
    ).duration


def held_microbatches(schedule: str, num_microbatches: int, num_stages: int) -> tuple[int, ...]:
    """The most microbatches whose activations each stage keeps, on one of its ranks, at once.

    DualPipe's ranks hold ``S + 1`` in all: ``S - s`` of stage ``s`` and ``s + 1`` of its mirror image.
    """
    match schedule:
        case "gpipe":
            held = [num_microbatches] * num_stages
        case "zb1p":
            held = [num_stages] * num_stages
        case _:
            held = [num_stages - stage for stage in range(num_stages)]
    return tuple(min(count, num_microbatches) for count in held)
