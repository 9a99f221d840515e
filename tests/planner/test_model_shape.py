"""The planner's value of a model against the model's own counts."""

import pytest

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.count import count_parameters, training_flops
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.pipeline.partition import partition
from lightning_dualpipe.planner.layout import Layout
from lightning_dualpipe.planner.memory import near
from lightning_dualpipe.planner.stages import cut
from lightning_dualpipe.schedules import Placement
from tests.planner.shapes import shape

MODELS = [
    ("tiny", {}),
    ("small", {"tie_word_embeddings": True, "num_nextn_predict_layers": 2}),
    ("16b", {"attention_bias": True}),
    ("671b", {}),
]


@pytest.mark.parametrize(("preset", "overrides"), MODELS)
def test_parameters_are_those_of_the_model(preset, overrides):
    config = DeepSeekV3Config.from_preset(preset, **overrides)
    assert shape(preset, **overrides).parameters == count_parameters(config).total_with_mtp


@pytest.mark.parametrize(("preset", "overrides"), MODELS)
def test_flops_are_those_of_the_model(preset, overrides):
    config = DeepSeekV3Config.from_preset(preset, **overrides)
    model = shape(preset, **overrides)
    works = [part for layer in model.layers for part in (layer.attention, layer.feed_forward)]
    forward = sum(work.matmul + work.plain + work.core for work in works)
    assert 3 * forward == pytest.approx(training_flops(config, 4096), rel=1e-9)
    assert model.training_flops == training_flops(config, 4096)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "1f1b"])
def test_parameters_of_all_stages_add_up_to_the_model(schedule):
    layout = Layout(2048, 16, 64, schedule, 1, 120)
    stages = cut(shape(), layout.num_stages, mirrored=layout.placement.is_mirrored)
    assert sum(layer.dense + layer.experts for stage in stages for layer in stage) == shape().parameters
    ranks = [near(layout, stages, rank) for rank in range(layout.pipeline)]
    total = sum(parameters.dense + 64 * parameters.experts for parameters in ranks)
    # Multi-token prediction uses the embedding; DualPipe(V) has both on one rank.
    copied = 129280 * 7168 if schedule == "1f1b" else 0
    assert total == layout.copies * shape().parameters + copied


@pytest.mark.parametrize("place", [Placement.line, Placement.bidirectional], ids=["one stage", "mirrored"])
@pytest.mark.parametrize(("preset", "num_stages"), [("tiny", 2), ("tiny", 6), ("16b", 8), ("671b", 16), ("671b", 32)])
def test_the_cut_is_that_of_the_pipeline(preset, num_stages, place):
    import torch

    with torch.device("meta"):
        layers = Transformer(DeepSeekV3Config.from_preset(preset)).layers()
    placement = place(num_stages)
    there = [[layers[index].name for index in indices] for indices in partition(layers, placement)]
    stages = cut(shape(preset), num_stages, mirrored=placement.is_mirrored)
    here = [[layer.name for layer in stage] for stage in stages]
    assert [len(stage) for stage in here] == [len(stage) for stage in there]
    assert [stage[0] for stage in here] == [stage[0] for stage in there]
