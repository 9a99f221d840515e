"""Initial weights: the report's distribution, and the same numbers however the model is held."""

import pytest
import torch
from torch import nn

from lightning_dualpipe.deepseek_v3.config import DeepSeekV3Config
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.parallel.dispatch import LocalDispatcher
from tests.deepseek_v3.small import small_config


class Share(LocalDispatcher):
    def __init__(self, first, count):
        super().__init__(count)
        self.first_local_expert = first


def test_matrices_are_normal_norms_one_and_biases_zero():
    model = Transformer(DeepSeekV3Config.from_preset("tiny", initializer_range=0.006, attention_bias=True))

    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.mean().item() == pytest.approx(0, abs=5 * 0.006 / parameter.numel() ** 0.5), name
            assert parameter.std().item() == pytest.approx(0.006, rel=0.1), name
    assert all((router.e_score_correction_bias == 0).all() for _, router in model.routers())


def test_no_two_tensors_share_their_numbers():
    model = Transformer(small_config())
    rows = [row for _, p in model.named_parameters() if p.dim() > 1 for row in (p if p.dim() == 3 else [p])]
    first = [row.flatten()[0].item() for row in rows]
    assert len(set(first)) == len(first)


def test_a_cut_model_gets_the_weights_of_the_whole():
    """Layer 2, prediction depth 1 and the head, with experts 4 to 7; made on the meta device."""
    whole = Transformer(small_config(), seed=7)
    with torch.device("meta"):
        part = Transformer(small_config())
    part.embed_tokens = part.blocks[0] = part.blocks[1] = part.mtp[0] = nn.Identity()
    for _, mixture in part.mixtures():
        mixture.use_dispatcher(Share(4, 4))
    part.to_empty(device="cpu").initialize_weights(7)

    want = whole.state_dict()
    names = list(part.state_dict())
    assert {name.split(".")[0] for name in names} == {"blocks", "mtp", "norm", "lm_head"}
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, want[name][4:8] if ".experts." in name and "shared" not in name else want[name]), (
            name
        )


def test_seeds_differ_and_repeat():
    one, again, other = (Transformer(small_config(), seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_precisions_agree_up_to_rounding_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    single = Transformer(small_config())
    torch.set_default_dtype(torch.float64)
    try:
        double = Transformer(small_config())
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(torch.get_rng_state(), before)
    for mine, theirs in zip(single.parameters(), double.parameters(), strict=True):
        assert theirs.dtype == torch.float64 and torch.equal(mine.double(), theirs)
    assert all(router.e_score_correction_bias.dtype == torch.float32 for _, router in double.routers())


def test_tied_weights_are_drawn_once_under_the_name_of_the_embedding():
    tied, loose = (Transformer(small_config(tie_word_embeddings=tie)) for tie in (True, False))

    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, loose.embed_tokens.weight)
