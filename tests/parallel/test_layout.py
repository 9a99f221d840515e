import pytest

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.parallel.layout import ParallelLayout


def test_the_table_of_the_docstring():
    """World 8, pipeline 2, expert 2; worked out by hand."""
    layout = ParallelLayout(8, pipeline=2, expert=2)
    assert (layout.data, layout.expert_data) == (4, 2)
    table = [
        # rank, pipeline, data, expert, expert-data; ranks of the same pipeline, data, expert, expert-data
        (0, 0, 0, 0, 0, (0, 4), (0, 1, 2, 3), (0, 1), (0, 2)),
        (1, 0, 1, 1, 0, (1, 5), (0, 1, 2, 3), (0, 1), (1, 3)),
        (2, 0, 2, 0, 1, (2, 6), (0, 1, 2, 3), (2, 3), (0, 2)),
        (3, 0, 3, 1, 1, (3, 7), (0, 1, 2, 3), (2, 3), (1, 3)),
        (4, 1, 0, 0, 0, (0, 4), (4, 5, 6, 7), (4, 5), (4, 6)),
        (5, 1, 1, 1, 0, (1, 5), (4, 5, 6, 7), (4, 5), (5, 7)),
        (6, 1, 2, 0, 1, (2, 6), (4, 5, 6, 7), (6, 7), (4, 6)),
        (7, 1, 3, 1, 1, (3, 7), (4, 5, 6, 7), (6, 7), (5, 7)),
    ]
    for rank, pipeline, data, expert, expert_data, *groups in table:
        assert layout.pipeline_rank(rank) == pipeline and layout.data_rank(rank) == data
        assert layout.expert_rank(rank) == expert and layout.expert_data_rank(rank) == expert_data
        assert layout.rank(pipeline=pipeline, data=data) == rank
        of_rank = (layout.pipeline_ranks, layout.data_ranks, layout.expert_ranks, layout.expert_data_ranks)
        assert [ranks(rank) for ranks in of_rank] == groups


@pytest.mark.parametrize(
    ("world", "pipeline", "expert"), [(1, 1, 1), (4, 4, 1), (4, 1, 4), (12, 3, 2), (12, 1, 3), (24, 2, 3), (30, 5, 6)]
)
def test_groups_partition_the_world_and_meet_in_one_rank(world, pipeline, expert):
    layout = ParallelLayout(world, pipeline=pipeline, expert=expert)
    layout.check(num_experts=6 * expert)
    for ranks in (layout.pipeline_ranks, layout.data_ranks, layout.expert_ranks, layout.expert_data_ranks):
        assert all(ranks(other) == ranks(rank) for rank in range(world) for other in ranks(rank))
        assert all(rank in ranks(rank) and list(ranks(rank)) == sorted(ranks(rank)) for rank in range(world))
    for rank in range(world):
        assert set(layout.pipeline_ranks(rank)) & set(layout.data_ranks(rank)) == {rank}
        assert set(layout.expert_ranks(rank)) & set(layout.expert_data_ranks(rank)) == {rank}
        assert set(layout.expert_ranks(rank)) <= set(layout.data_ranks(rank))
        assert len(layout.expert_ranks(rank)) * len(layout.expert_data_ranks(rank)) == layout.data


@pytest.mark.parametrize(
    ("layout", "num_experts", "says"),
    [
        (
            ParallelLayout(8, pipeline=3),
            None,
            ["pipeline_parallel_size=3 does not divide the 8 processes", "1, 2, 4, 8"],
        ),
        (ParallelLayout(8, pipeline=16), None, ["pipeline_parallel_size=16 does not divide", "multiple of 16"]),
        (ParallelLayout(8, pipeline=2, expert=3), None, ["does not divide the 4 data ranks", "use one of 1, 2, 4"]),
        (ParallelLayout(4, expert=4), 6, ["does not divide the model's 6 routed experts", "use one of 1, 2, 3, 6"]),
        (ParallelLayout(8, pipeline=3, expert=4), 6, ["the 8 processes", "the model's 6 routed experts"]),
        (ParallelLayout(4, pipeline=0, expert=-1), 6, ["pipeline_parallel_size is 0", "expert_parallel_size is -1"]),
        (ParallelLayout(0), None, ["the number of processes is 0"]),
    ],
)
def test_everything_wrong_is_said_in_one_error(layout, num_experts, says):
    with pytest.raises(ConfigurationError, match="this parallel layout cannot run") as error:
        layout.check(num_experts=num_experts)
    assert all(part in str(error.value) for part in says)
    assert len(layout.problems(num_experts=num_experts)) == str(error.value).count("\n  - ")


def test_a_layout_that_fits_has_no_problems():
    assert ParallelLayout(64, pipeline=16, expert=4).problems(num_experts=256) == []
