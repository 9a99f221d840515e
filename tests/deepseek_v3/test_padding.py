"""Sequences filled up on the right compute what they compute alone; any other mask is refused."""

import copy

import pytest
import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3 import padding
from lightning_dualpipe.deepseek_v3.hf_config import config_from_hf
from lightning_dualpipe.deepseek_v3.model import Transformer
from lightning_dualpipe.errors import ConfigurationError
from tests.deepseek_v3.small import random_batch, random_model, small_config
from tests.marks import needs, needs_cuda

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


class Slow:
    """The answer of a GPU that has other things to do."""

    arrived = False

    def __init__(self, mask: Tensor) -> None:
        self.found = padding._broken(mask)

    def is_there(self) -> bool:
        return self.arrived

    def read(self) -> Tensor:
        return self.found


LATE = "attention_mask with tokens after padding in a batch before .* is not supported"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setattr(padding, "_Answer", Slow)
    monkeypatch.setattr(Slow, "arrived", False)
    monkeypatch.setattr(padding, "_answers_later", lambda mask: True)
    return Slow


def on_a_gpu(mask: Tensor) -> dict[str, Tensor]:
    """As far as a CPU can tell: the device of a tensor without memory is not the CPU."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 0)

    return {"input_ids": torch.zeros_like(mask), "attention_mask": mask.as_subclass(Elsewhere)}


LEFT, RIGHT = torch.tensor([[0, 1, 1]]), torch.tensor([[1, 1, 0]])


def test_a_gpu_is_not_waited_for_and_its_answer_is_read_at_a_later_batch(slow: type[Slow]) -> None:
    check = padding.PaddingCheck()
    check(on_a_gpu(LEFT))
    check(on_a_gpu(RIGHT))
    slow.arrived = True
    with pytest.raises(ConfigurationError, match=LATE):
        check(on_a_gpu(RIGHT))
    check(on_a_gpu(RIGHT))  # it has been told


def test_in_the_end_the_last_answers_are_waited_for(slow: type[Slow]) -> None:
    check = padding.PaddingCheck()
    check(on_a_gpu(RIGHT))
    check(on_a_gpu(LEFT))
    check.collect()
    with pytest.raises(ConfigurationError, match=LATE):
        check.collect(wait=True)


def test_a_shape_is_wrong_at_once_wherever_the_mask_is(slow: type[Slow]) -> None:
    with pytest.raises(ConfigurationError, match=r"of shape \[1, 3\] for input_ids \[1, 2\]"):
        padding.PaddingCheck()({**on_a_gpu(LEFT), "input_ids": torch.zeros(1, 2)})


def test_a_copy_of_a_model_waits_for_no_answers_of_the_original(slow: type[Slow]) -> None:
    check = padding.PaddingCheck()
    check(on_a_gpu(LEFT))
    copy.deepcopy(check).collect(wait=True)


@needs_cuda
def test_padding_on_the_left_is_noticed_on_a_gpu() -> None:
    model = random_model(small_config()).float().cuda()
    batch = {name: value.cuda() for name, value in random_batch(model.config, 2, 3).items()}
    model({**batch, "attention_mask": torch.cat([RIGHT, RIGHT]).cuda()})
    model({**batch, "attention_mask": torch.cat([RIGHT, LEFT]).cuda()})
    with pytest.raises(ConfigurationError, match=LATE):
        model.padding.collect(wait=True)


@needs_cuda
def test_nothing_waits_for_the_gpu() -> None:
    check = padding.PaddingCheck()
    right, left = ({"input_ids": mask.cuda(), "attention_mask": mask.cuda()} for mask in (RIGHT, LEFT))
    check(right)
    check.collect(wait=True)  # kernels and host memory are there: the first of each makes the host wait
    torch.cuda._sleep(2_000_000_000)  # about a second
    check(left)
    assert not torch.cuda.current_stream().query()
    check.collect()
    with pytest.raises(ConfigurationError, match=LATE):
        check.collect(wait=True)
