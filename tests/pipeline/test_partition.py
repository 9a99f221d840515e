import time
from itertools import combinations, pairwise
from random import Random

import pytest
import torch
from torch import nn

from lightning_dualpipe.errors import ConfigurationError
from lightning_dualpipe.interface import Layer, as_layers
from lightning_dualpipe.pipeline.partition import Elsewhere, Whole, keep_only, materialize, partition, uncut
from lightning_dualpipe.schedules import Placement


def layers_of(costs, *, glued=()):
    return [Layer(str(index), (), (), cost, index in glued) for index, cost in enumerate(costs)]


def costs_of(layers, parts):
    return [sum(layers[index].cost for index in part) for part in parts]


def busiest(layers, parts, placement):
    """What the rank with most to do has to do, with a microbatch on each of its stages."""
    costs = costs_of(layers, parts)
    return max(sum(costs[stage] for stage in placement.stages_on(rank)) for rank in range(placement.num_ranks))


def all_cuts(layers, num_stages):
    """Every way to cut where cutting is allowed."""
    places = [index for index, layer in enumerate(layers) if index and not layer.with_previous]
    for cuts in combinations(places, num_stages - 1):
        yield [range(start, stop) for start, stop in pairwise([0, *cuts, len(layers)])]


def random_layers(seed, most):
    random = Random(seed)
    costs = [random.choice([0, 1, random.random(), random.randint(1, 1000)]) for _ in range(random.randint(1, most))]
    return layers_of(costs, glued=[index for index in range(len(costs)) if random.random() < 0.25])


def placements(layers):
    """All that have as many stages as there are places for, or fewer."""
    most = 1 + sum(not layer.with_previous for layer in layers[1:])
    yield from map(Placement.line, range(1, most + 1))
    yield from map(Placement.bidirectional, range(2, most + 1, 2))
    yield from map(Placement.v, range(1, most // 2 + 1))


@pytest.mark.parametrize("seed", range(40))
def test_no_other_cut_leaves_the_busiest_rank_less_to_do(seed):
    layers = random_layers(seed, most=9)
    for placement in placements(layers):
        parts = partition(layers, placement)

        assert [index for part in parts for index in part] == list(range(len(layers)))  # all, in order, once
        assert len(parts) == placement.num_stages and all(parts)
        assert not any(layers[part.start].with_previous for part in parts[1:])
        least = min(busiest(layers, each, placement) for each in all_cuts(layers, placement.num_stages))
        assert busiest(layers, parts, placement) == pytest.approx(least)


def squares(layers, parts):
    return sum(cost**2 for cost in costs_of(layers, parts))


@pytest.mark.parametrize("seed", range(20))
def test_where_ranks_have_two_stages_no_cut_as_good_is_more_even(seed):
    layers = random_layers(100 + seed, most=9)
    for placement in filter(lambda each: each.is_mirrored, placements(layers)):
        parts = partition(layers, placement)
        limit = busiest(layers, parts, placement) * (1 + 1e-9)
        cuts = all_cuts(layers, placement.num_stages)
        least = min(squares(layers, each) for each in cuts if busiest(layers, each, placement) <= limit)
        assert squares(layers, parts) == pytest.approx(least)


def test_a_stage_and_its_mirror_image_are_balanced_together():
    """A tail as dear as four layers: the rank that has it has less of the beginning."""
    layers = layers_of([0, 1, 1, 1, 1, 1, 1, 4])
    assert costs_of(layers, partition(layers, Placement.line(4))) == [2, 2, 2, 4]
    for placement in (Placement.bidirectional(4), Placement.v(2)):
        assert costs_of(layers, partition(layers, placement)) == [1, 2, 3, 4]


def test_layers_that_belong_together_stay_together():
    layers = layers_of([1, 1, 1, 1, 5, 1], glued=[0, 1, 5])  # before the first there is nothing to cut
    assert partition(layers, Placement.line(4)) == (range(2), range(2, 3), range(3, 4), range(4, 6))


@pytest.mark.parametrize(("glued", "places"), [((), 3), ((2,), 2), ((1, 2), 1)])
def test_more_stages_than_places_to_cut_is_an_error_that_counts_them(glued, places):
    with pytest.raises(
        ConfigurationError, match=rf"4 stages need at least 4 layers .* the model has {places} .* fewer"
    ):
        partition(layers_of([1, 1, 1], glued=glued), Placement.line(4))


@pytest.mark.parametrize("placement", [Placement.line(64), Placement.bidirectional(64)], ids=["one stage", "mirrored"])
def test_a_long_model_is_cut_at_once(placement):
    parts = partition(layers_of([1 + index % 7 for index in range(200)]), placement)
    assert len(parts) == 64


def test_a_mirrored_cut_of_a_model_that_is_mostly_head_is_found_in_seconds():
    begun = time.process_time()
    layers = layers_of([1] * 80 + [60])
    parts = partition(layers, Placement.bidirectional(16))
    assert busiest(layers, parts, Placement.bidirectional(16)) == 61
    assert time.process_time() - begun < 20  # half a second alone on a core of the development machine


class Model(nn.Module):
    """Tied ends, a buffer in a layer and one outside, something frozen outside of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def layers(self):
        return as_layers([self.embedding, *self.blocks, self.norm, self.head])


STAGES = (range(2), range(2, 4), range(4, 6))


def cut(model, stage):
    layers = model.layers()
    keep_only(model, [layers[index] for index in STAGES[stage]], layers)
    return model


def test_the_whole_is_known_by_name_shape_and_format():
    model = Model()
    whole = Whole.of(model, model.layers(), STAGES)

    state = model.state_dict()
    assert list(whole.tensors) == list(state)
    for name, spec in whole.tensors.items():
        assert (spec.shape, spec.dtype) == (tuple(state[name].shape), state[name].dtype)


class Describes(nn.Linear):
    def __init__(self, said: object) -> None:
        super().__init__(4, 4)
        self.said = said

    def get_extra_state(self) -> object:
        return self.said


@pytest.mark.parametrize("said", [{"scale": 2}, torch.ones(3)], ids=["no tensor", "a tensor"])
def test_what_a_module_says_of_itself_is_no_tensor_of_the_model(said):
    model = Model()
    model.blocks[1].append(Describes(said))
    names = set(Whole.of(model, model.layers(), STAGES).tensors)
    assert names == set(model.state_dict()) - {"blocks.1.2._extra_state"}


def test_a_tied_weight_has_two_names_and_the_stages_of_both():
    model = Model()
    whole = Whole.of(model, model.layers(), STAGES)

    assert whole.same_as["head.weight"] == whole.same_as["embedding.weight"] == "embedding.weight"
    assert whole.stages_of["embedding.weight"] == (0, 2)
    assert "head.weight" not in whole.stages_of
    assert all(whole.same_as[name] == name for name in whole.tensors if name != "head.weight")


def test_every_tensor_knows_the_stages_that_use_it():
    model = Model()
    stages_of = Whole.of(model, model.layers(), STAGES).stages_of

    assert stages_of["blocks.0.0.weight"] == (0,)
    assert stages_of["blocks.2.1.running_mean"] == (1,)  # a buffer
    assert stages_of["norm.bias"] == (2,)
    assert stages_of["step"] == stages_of["teacher.weight"] == (0, 1, 2)  # of no layer: every rank keeps it


def test_a_trained_parameter_of_no_layer_is_an_error_that_names_it():
    model = Model()
    model.teacher.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"2 parameters .*\(teacher\.weight, teacher\.bias\).*Model\.layers"):
        Whole.of(model, model.layers(), STAGES)


def test_of_many_such_parameters_the_first_five_are_named():
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "rest": nn.ModuleList(nn.Linear(1, 1) for _ in range(3))})
    with pytest.raises(ConfigurationError, match=r"6 parameters .*rest\.2\.weight, …\)"):
        Whole.of(model, as_layers([model["used"]]), (range(1),))


@pytest.mark.parametrize("stage", range(3))
def test_what_stays_is_what_its_stage_uses_under_the_names_of_the_whole(stage):
    model = Model()
    whole = Whole.of(model, model.layers(), STAGES)
    expected = [name for name in whole.tensors if stage in whole.stages_of[whole.same_as[name]]]
    kept_ids = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    found = cut(model, stage).state_dict(keep_vars=True)
    tied_elsewhere = {0: {"head.weight"}, 2: {"embedding.weight"}}.get(stage, set())  # the other end's name is gone
    assert list(found) == [name for name in expected if name not in tied_elsewhere]
    assert all(id(tensor) == kept_ids[name] for name, tensor in found.items())


def test_a_placeholder_says_what_is_elsewhere():
    model = cut(Model(), 1)
    assert isinstance(model.blocks[0], Elsewhere) and len(model.blocks) == 3
    with pytest.raises(RuntimeError, match=r"blocks\.0 is held by another rank; call the whole model"):
        model.blocks[0](torch.zeros(1, 4))
    assert "Elsewhere(blocks.0)" in str(model)


def test_a_module_that_a_kept_layer_shares_stays_wherever_it_is_named():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2))})
    model["again"] = model["b"]
    layers = as_layers([model["a"], model["b"], model["again"]])
    keep_only(model, layers[2:], layers)
    assert model["b"] is model["again"] and isinstance(model["a"], Elsewhere)
    keep_only(model, [], layers)
    assert isinstance(model["b"], Elsewhere) and isinstance(model["again"], Elsewhere)


def test_a_layer_may_be_put_together_from_modules_that_are_elsewhere_in_the_model():
    """``layers()`` may return ``nn.Sequential(self.norm, self.head)``: what it is made of is cut all the same."""
    model = Model()
    layers = as_layers([model.embedding, *model.blocks, nn.Sequential(model.norm, model.head)])
    keep_only(model, layers[1:2], layers)
    assert isinstance(model.norm, Elsewhere) and isinstance(model.head, Elsewhere)
    assert {name.split(".")[0] for name in model.state_dict()} == {"blocks", "step", "teacher"}


def test_of_a_module_that_is_used_in_part_the_rest_goes():
    model = nn.ModuleDict({"block": nn.ModuleDict({"attention": nn.Linear(2, 2), "mlp": nn.Linear(2, 3)})})
    block = model["block"]
    layers = [Layer("attention", (), (block["attention"],), 1), Layer("all of it", (), (block,), 1)]
    keep_only(model, layers[:1], layers)
    assert list(model.state_dict()) == ["block.attention.weight", "block.attention.bias"]
    assert isinstance(block["mlp"], Elsewhere)


@pytest.mark.parametrize("stage", range(3))
def test_for_a_while_the_model_has_all_its_parameters_again_but_no_memory_for_them(stage):
    model = Model()
    whole = Whole.of(model, model.layers(), STAGES)
    before = [(name, parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()]
    cut(model, stage)
    held, text = {id(parameter) for parameter in model.parameters()}, str(model)

    with uncut(model, whole.same_as) as stand_ins:
        assert [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()] == before
        for name, parameter in model.named_parameters():
            assert (id(parameter) in held) != parameter.is_meta
            assert stand_ins.get(id(parameter)) == (name if parameter.is_meta else None)
        assert model.head.weight is model.embedding.weight
    assert {id(parameter) for parameter in model.parameters()} == held and str(model) == text


def test_what_gets_memory_keeps_its_ties_formats_and_flags():
    with torch.device("meta"):
        model = Model().to(torch.bfloat16)
        model.register_buffer("scratch", torch.zeros(2), persistent=False)
        model.also = nn.Module()
        model.also.register_buffer("scratch", model.scratch)
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}

    assert materialize(model, torch.device("cpu"))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == before
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.head.weight is model.embedding.weight and model.also.scratch is model.scratch
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert "scratch" not in model.state_dict()


def test_what_has_memory_is_left_alone():
    model = Model()
    weight = model.norm.weight
    assert not materialize(model, torch.device("cpu"))
    assert model.norm.weight is weight
