import random
from collections import Counter

import pytest

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.schedules import SCHEDULES, Action, Compute, Kind, build_schedule, lower


def random_case(seed):
    draw = random.Random(seed)
    name = SCHEDULES[seed % len(SCHEDULES)]
    num_ranks = draw.choice(range(2, 15, 2)) if name == "dualpipe" else draw.randint(1, 13)
    return name, num_ranks, draw.randint(1, 3 * num_ranks + 3)


@pytest.mark.parametrize("seed", range(320))
def test_any_size_is_complete_and_free_of_deadlock(seed):
    """``lower`` checks the schedule before, and the programs after."""
    schedule = build_schedule(*random_case(seed))
    lower(schedule)
    lower(schedule.forward_only())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_the_smallest_pipelines(name, num_microbatches):
    schedule = build_schedule(name, 2 if name == "dualpipe" else 1, num_microbatches)
    programs = lower(schedule)
    if schedule.num_ranks == 1:
        assert all(isinstance(i, Compute) for i in programs[0].instructions), "a rank alone has nobody to talk to"


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_microbatches", [1, 5, 8, 13])
def test_every_microbatch_passes_every_stage_once(name, num_microbatches):
    """The same that ``check`` checks, told by counting."""
    schedule = build_schedule(name, 4, num_microbatches)
    counts = Counter(action for steps in schedule.steps for step in steps for action in step)
    assert set(counts.values()) == {1}
    for stage in range(schedule.num_stages):
        for microbatch in range(num_microbatches):
            forward, full, split, weight = (counts[Action(stage, kind, microbatch)] for kind in Kind)
            assert (forward, full + split, weight) == (1, 1, split)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 2), (2, 4), (3, 7), (4, 10), (8, 16)])
def test_dualpipev_is_the_one_of_torch(num_ranks, num_microbatches):
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    theirs = visualizer.get_schedule_ops("DualPipeV", num_ranks, num_microbatches, num_stages_per_rank=2)
    ours = build_schedule("dualpipev", num_ranks, num_microbatches).steps
    for mine, program in zip(ours, theirs, strict=True):
        steps = [op.sub_actions or (op,) for op in program if op is not None]
        assert [[str(action) for action in step] for step in mine] == [[str(op) for op in step] for step in steps]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (4, 8), (8, 20), (6, 12)])
def test_dualpipe_is_two_dualpipev_face_to_face(num_ranks, num_microbatches):
    """The left half runs the V, its way up serving the microbatches that flow left; the right half mirrors it."""
    half = num_microbatches // 2
    v = build_schedule("dualpipev", num_ranks // 2, half)
    whole = build_schedule("dualpipe", num_ranks, num_microbatches)

    def seen_from(rank, action):
        """A microbatch flows away from the rank's end of the line on the way down, and towards it on the way up."""
        going_right = (action.stage < num_ranks // 2) == (rank < num_ranks // 2)
        return Action(action.stage, action.kind, action.microbatch + (0 if going_right else half))

    for rank in range(num_ranks):
        of_v = v.steps[min(rank, num_ranks - 1 - rank)]
        expected = tuple(tuple(seen_from(rank, action) for action in step) for step in of_v)
        assert whole.steps[rank] == expected


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("num_microbatches", [32, 48, 120])
def test_number_of_overlapped_pairs_of_dualpipe(num_ranks, num_microbatches):
    """M - 3P/2 + q + 1, ``q`` ranks from either end, one less in the middle. Split backwards do not grow with M."""
    schedule = build_schedule("dualpipe", num_ranks, num_microbatches)
    for rank, steps in enumerate(schedule.steps):
        from_end = min(rank, num_ranks - 1 - rank)
        in_the_middle = from_end == num_ranks // 2 - 1
        pairs = sum(len(step) == 2 for step in steps)
        assert pairs == num_microbatches - 3 * num_ranks // 2 + from_end + 1 - in_the_middle
        splits = sum(action.kind is Kind.BACKWARD_INPUT for step in steps for action in step)
        assert splits == num_ranks // 2 + (num_ranks // 2 - from_end - 1)


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "messages"),
    [
        ("dualpipe", 3, 12, ["num_ranks=3", "take 4, or schedule='dualpipev'"]),
        ("dualpipe", 1, 12, ["num_ranks=1", "take 2, or schedule='dualpipev'"]),
        ("DualPipeV", 4, 8, ["'DualPipeV' is none of dualpipe, dualpipev, zb1p, 1f1b, gpipe", "mean 'dualpipev'"]),
        ("1f1", 4, 8, ["did you mean '1f1b'?"]),
        ("interleaved", 4, 8, ["'interleaved' is none of"]),
        ("gpipe", 0, 0, ["num_ranks=0: a pipeline has at least 1 rank", "num_microbatches=0: a step has at least 1"]),
        ("dualpipe", 5, -1, ["num_ranks=5", "num_microbatches=-1"]),
    ],
)
def test_what_cannot_be_built_is_explained_all_at_once(name, num_ranks, num_microbatches, messages):
    with pytest.raises(ConfigurationError) as caught:
        build_schedule(name, num_ranks, num_microbatches)
    for message in messages:
        assert message in str(caught.value)
