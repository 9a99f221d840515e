"""Sequences filled up on the right compute what they compute alone; any other mask is refused."""

import pytest
import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.hf_config import config_from_hf
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.errors import ConfigurationError
from tests.deepseek_v3.small import random_batch, random_model, small_config
from tests.marks import needs

LENGTHS = [5, 1, 9, 0]


def mask_for(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)).long()


def counts(model: Transformer) -> dict[str, list[int]]:
    return {name: router.tokens_per_expert.tolist() for name, router in model.routers()}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padded_sequences_compute_what_they_compute_alone(dtype: torch.dtype) -> None:
    """Also where the labels of padding were not ignored already."""
    config = small_config()
    together, alone = random_model(config), random_model(config)
    batch = random_batch(config, len(LENGTHS), 9)

    got = together({**batch, "attention_mask": mask_for(LENGTHS, 9).to(dtype)})
    parts = [alone({name: value[b : b + 1, :size] for name, value in batch.items()}) for b, size in enumerate(LENGTHS)]
    got["loss"].backward()
    sum(part["loss"] * part["tokens"] / sum(LENGTHS) for part in parts).backward()

    assert got["tokens"] == sum(part["tokens"] for part in parts) == sum(LENGTHS)
    for name, value in got.items():
        if name != "tokens":
            expected = sum(part[name] * part["tokens"] for part in parts) / sum(LENGTHS)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)
    assert counts(together) == counts(alone)
    assert sum(counts(together)["mtp.1.block.mlp.gate"]) == 3 * (3 + 0 + 7 + 0)
    for (name, mine), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=lambda _, name=name: name)


def test_a_mask_without_padding_changes_no_bit() -> None:
    model = random_model(small_config()).float()
    batch = random_batch(model.config, 3, 9)
    plain, masked = model(batch), model({**batch, "attention_mask": torch.ones(3, 9)})
    assert all(torch.equal(value, masked[name]) for name, value in plain.items())


@needs("transformers")
def test_logits_of_tokens_beside_padding_are_those_of_transformers() -> None:
    from tests.deepseek_v3.test_hf_parity import BASE
    from tests.deepseek_v3.test_model import ours_of
    from tests.oracles.transformers_float64 import in_float64, new_reference

    settings = {**BASE, "num_nextn_predict_layers": 0}
    reference = new_reference(**settings)
    model = Transformer(config_from_hf(settings)).double().eval()
    model.load_state_dict({ours_of(name): tensor for name, tensor in reference.state_dict().items()})
    input_ids = torch.randint(67, (3, 41))
    mask = mask_for([41, 17, 30], 41)

    with in_float64(), torch.no_grad():
        want = reference(input_ids, attention_mask=mask, use_cache=False).logits
        got = model({"input_ids": input_ids, "attention_mask": mask})

    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-10)


REFUSED = {
    "padding on the left": (torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), "with tokens after padding"),
    "a hole": (torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]), "with tokens after padding"),
    "additive": (torch.tensor([[0.0, 0.0, 0.0, -1e9]] * 2), "with values other than 0 and 1"),
    "of keys and queries": (torch.ones(2, 1, 4, 4), r"of shape \[2, 1, 4, 4\] for input_ids \[2, 4\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_any_other_mask_is_refused(case: str) -> None:
    mask, message = REFUSED[case]
    batch = {**random_batch(small_config(), 2, 4), "attention_mask": mask}
    with pytest.raises(ConfigurationError, match=f"attention_mask {message} is not supported: .*padding_side='right'"):
        Transformer(small_config())(batch)
