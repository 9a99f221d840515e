"""See a pipeline schedule, and what it costs, before there is any model.

    python examples/draw_schedule.py                            # DualPipe on 4 ranks, as text
    python examples/draw_schedule.py dualpipev 4 10             # another schedule, ranks, microbatches
    python examples/draw_schedule.py dualpipe 8 20 picture.svg  # as a picture (.svg, .png, .pdf)

``lightning-dualpipe draw`` does the same with more options.
"""

import sys

from lightning_dualpipe.schedules import SCHEDULES, Costs, build_schedule, draw_picture, draw_text, simulate

# One forward takes 1; a backward is its input gradient and its weight gradient; a forward and a backward that
# overlap take as long as the backward alone, the communication of each hidden behind the other's computation.
COSTS = Costs(forward=1, backward_input=1, backward_weight=1, overlapped=2)

DEFAULTS = ["dualpipe", "4", "8"]
name, num_ranks, num_microbatches, *path = sys.argv[1:] + DEFAULTS[len(sys.argv) - 1 :]
schedule = build_schedule(name, int(num_ranks), int(num_microbatches))
print(draw_picture(schedule, COSTS, path[0]) if path else draw_text(schedule, COSTS))

print(f"{'':10} {'time':>6} {'idle':>6} {'held':>6}   held: activations of so many stages x microbatches, at most")
for other in SCHEDULES:
    if other != "dualpipe" or schedule.num_ranks % 2 == 0:
        half = 0.5 if other == "dualpipev" else 1.0  # its stages are half as large, two to a rank
        costs = Costs(half, half, half, 2 * half)
        timeline = simulate(build_schedule(other, schedule.num_ranks, schedule.num_microbatches), costs)
        print(f"{other:10} {timeline.duration:6.4g} {timeline.idle_share:6.1%} {max(timeline.peak) * half:6.4g}")
