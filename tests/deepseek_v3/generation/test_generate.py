"""``generate`` and ``stream``: what is chosen, when it ends, and what stays as it was."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dualpipe import DeepSeekV3
from tests.deepseek_v3.generation.models import (
    greedy_by_full_forwards,
    language,
    random_module,
    random_prompts,
    trained_module,
)

LENGTHS = [7, 1, 19, 7, 12]


@pytest.fixture(scope="module")
def module() -> DeepSeekV3:
    return random_module()


@pytest.fixture(scope="module")
def prompts(module: DeepSeekV3) -> list[list[int]]:
    return random_prompts(module.config.vocab_size, LENGTHS)


@pytest.fixture(scope="module")
def expected(module: DeepSeekV3, prompts: list[list[int]]) -> list[list[int]]:
    return [greedy_by_full_forwards(module.model, prompt, 12) for prompt in prompts]


# ---- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 7, 1024])
def test_a_batch_of_any_lengths_read_in_any_chunks_gives_what_full_forwards_do(
    chunk: int, module: DeepSeekV3, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert len({tuple(text) for text in expected}) == len(expected), "equal texts would hide an exchange"
    generated = module.generate(prompts, max_new_tokens=12, prefill_chunk=chunk)
    assert generated.tokens == expected
    assert generated.finish_reasons == ["length"] * len(prompts)
    assert generated.statistics.new_tokens == 60 and generated.statistics.prompt_tokens == sum(LENGTHS)
    assert generated.statistics.rounds == 55 and generated.statistics.tokens_per_round == 1


def test_prompts_may_come_in_any_form(module: DeepSeekV3, prompts: list[list[int]], expected: list[list[int]]) -> None:
    one = prompts[0]
    for given in (one, tuple(one), torch.tensor(one), torch.tensor([one]), [torch.tensor(one)], [one]):
        assert module.generate(given, max_new_tokens=12).tokens == expected[:1]
    both = torch.tensor([prompts[0], prompts[3]], dtype=torch.int32)
    assert module.generate(both, max_new_tokens=12).tokens == [expected[0], expected[3]]


def test_text_may_end_at_the_last_position_of_the_model() -> None:
    module = random_module(max_position_embeddings=20)
    prompt = random_prompts(module.config.vocab_size, [8])
    expected = greedy_by_full_forwards(module.model, prompt[0], 12)
    for speculate in (0, 3):
        assert module.generate(prompt, max_new_tokens=12, speculate=speculate).tokens == [expected]


# ---- the end of a text ----------------------------------------------------------------------------


@pytest.mark.parametrize("speculate", [0, 2])
def test_a_stop_token_ends_its_own_text_only(
    speculate: int, module: DeepSeekV3, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    counts = {token: sum(token in text[1:] for text in expected) for token in range(module.config.vocab_size)}
    stops = [next(token for token, count in counts.items() if 1 < count < len(expected))]
    generated = module.generate(prompts, max_new_tokens=12, stop=stops, speculate=speculate)
    for tokens, reason, whole in zip(generated.tokens, generated.finish_reasons, expected, strict=True):
        ends = [index for index, token in enumerate(whole) if token in stops]
        assert tokens == (whole[: ends[0] + 1] if ends else whole)
        assert reason == ("stop" if ends else "length")
    assert set(generated.finish_reasons) == {"stop", "length"}


def test_a_sequence_of_tokens_can_end_a_text(
    module: DeepSeekV3, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    pair = expected[2][5:7]
    backwards = pair[::-1]
    assert pair != backwards
    generated = module.generate(prompts[2], max_new_tokens=12, stop=[backwards, pair])
    assert generated.tokens == [expected[2][:7]] and generated.finish_reasons == ["stop"]


def test_the_end_may_be_anyones_to_see(module: DeepSeekV3, prompts: list[list[int]], expected: list[list[int]]) -> None:
    def third(tokens: Sequence[int]) -> bool:
        return len(tokens) == 3

    generated = module.generate(prompts, max_new_tokens=12, stop_when=third)
    assert generated.tokens == [text[:3] for text in expected] and set(generated.finish_reasons) == {"stop"}


@pytest.mark.parametrize("several", [False, True])
def test_texts_end_with_the_tokens_that_the_model_was_trained_to_end_them_with(
    several: bool,
    module: DeepSeekV3,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eos = expected[0][5]
    first = expected[0].index(eos)
    monkeypatch.setitem(module.hparams, "token_ids", {"eos_token_id": [28, eos] if several else eos})
    assert module.generate(prompts[0], max_new_tokens=12).tokens == [expected[0][: first + 1]] or several
    assert module.generate(prompts[0], max_new_tokens=12).finish_reasons == ["stop"]
    assert module.generate(prompts[0], max_new_tokens=12, stop=[]).tokens == expected[:1]


# ---- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculate", [0, 2])
def test_a_stream_yields_each_token_once_and_in_its_own_time(speculate: int) -> None:
    module = trained_module()
    prompts = [sequence.tolist()[:length] for sequence, length in zip(language(3, 20, 100), (20, 9, 14), strict=True)]
    whole = module.generate(prompts, max_new_tokens=15, stop=[11], speculate=speculate)

    stream = module.stream(prompts, max_new_tokens=15, stop=[11], speculate=speculate)
    texts: list[list[int]] = [[], [], []]
    for count, step in enumerate(stream):
        assert len(step) == 3 and all(len(new) <= 1 + speculate for new in step)
        if count == 0:
            assert all(len(new) == 1 for new in step)
        for text, new in zip(texts, step, strict=True):
            text.extend(new)
        assert texts == stream.generation.tokens
    assert texts == whole.tokens
    assert stream.generation.statistics == whole.statistics
    assert "stop" in whole.finish_reasons
    assert list(stream) == []


def test_a_stream_can_be_left_and_what_is_asked_wrongly_is_refused_before_its_first_token(module: DeepSeekV3) -> None:
    stream = module.stream([1, 2], max_new_tokens=100)
    first = next(stream)
    assert stream.generation.tokens == first
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        module.stream([1, 2], max_new_tokens=0)


# ---- what stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_a_training_is_touched(training: bool, prompts: list[list[int]]) -> None:
    module = random_module().train(training)
    routers = dict(module.model.routers())
    for router in routers.values():
        router.tokens_per_expert.fill_(7)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.manual_seed(5)
    random_state = torch.get_rng_state()

    generated = module.generate(prompts, max_new_tokens=4, temperature=1.0, speculate=2)

    assert all(len(text) == 4 for text in generated.tokens)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all((router.tokens_per_expert == 7).all() for router in routers.values())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(part.training == training for part in module.modules())
    loss = module.model({"input_ids": torch.tensor([prompts[2]]), "labels": torch.tensor([prompts[2]])})
    assert isinstance(loss, dict)
    loss["loss"].backward()  # with rotary tables that generation has made


def test_what_is_drawn_follows_from_the_seed(module: DeepSeekV3, prompts: list[list[int]]) -> None:
    def drawn(seed: int | torch.Generator | None) -> list[list[int]]:
        return module.generate(prompts, max_new_tokens=12, temperature=1.0, seed=seed).tokens

    assert drawn(3) == drawn(3) == drawn(torch.Generator().manual_seed(3))
    assert len({str(drawn(seed)) for seed in (3, 4, None, None)}) == 4


def test_other_precisions_and_autocast_run(prompts: list[list[int]]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module = random_module().to(dtype)
        plain = module.generate(prompts, max_new_tokens=6)
        assert all(len(text) == 6 for text in plain.tokens)
    module = random_module().to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = module.generate(prompts, max_new_tokens=6, speculate=2)
    assert all(len(text) == 6 for text in autocast.tokens)


def test_an_unbuilt_module_gets_its_weights_first() -> None:
    config = random_module().config
    assert len(DeepSeekV3(config=config).generate([1], max_new_tokens=2).tokens[0]) == 2


def test_numbers_that_are_none_are_not_taken_for_tokens(prompts: list[list[int]]) -> None:
    module = random_module()
    with torch.no_grad():
        module.model.norm.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        module.generate(prompts, max_new_tokens=2)


def test_the_three_lines_of_the_docs_write_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[3] / "docs" / "generation.md"
    program = re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(tmp_path)
    module = DeepSeekV3("tiny", token_ids={"eos_token_id": 257}, seed=0)
    module.configure_model()
    module.save_pretrained("exported")
    names: dict[str, Any] = {}
    exec(program, names)
    assert len(names["generated"].tokens[0]) == 64 or names["generated"].finish_reasons == ["stop"]
    assert names["generated"].statistics.drafted > 0
