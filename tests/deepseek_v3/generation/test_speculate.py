"""Speculation changes how many tokens a round chooses, never which."""

import pytest
import torch

from lightning_dualpipe.deepseek_v3.generation.speculate import Drafter
from tests.deepseek_v3.generation.models import VOCABULARY, language, random_module, random_prompts, trained_module

FIFTY = [1 + index % 13 for index in range(50)]


@pytest.mark.parametrize("speculate", [1, 2, 4])
def test_greedy_texts_of_50_prompts_are_the_same_with_drafts_that_are_taken_at_times(speculate: int) -> None:
    module = trained_module()
    prompts = [sequence[:length].tolist() for sequence, length in zip(language(50, 13, 200), FIFTY, strict=True)]
    stop = [5]  # so that sequences leave the batch at different times
    plain = module.generate(prompts, max_new_tokens=24, stop=stop)

    drafted = module.generate(prompts, max_new_tokens=24, stop=stop, speculate=speculate)

    assert drafted.tokens == plain.tokens
    assert drafted.finish_reasons == plain.finish_reasons
    assert set(plain.finish_reasons) == {"stop", "length"} and len(set(map(len, plain.tokens))) > 5
    statistics = drafted.statistics
    assert 0.3 < statistics.acceptance < 1, statistics
    assert len(statistics.accepted_at) == speculate and statistics.accepted_at[0] < statistics.drafted_at[0]
    assert all(statistics.accepted_at[:2])
    assert statistics.rounds < 0.8 * plain.statistics.rounds
    assert statistics.new_tokens == plain.statistics.new_tokens


@pytest.mark.parametrize("depths", [1, 2])
def test_greedy_texts_of_50_prompts_are_the_same_with_drafts_that_are_not(depths: int) -> None:
    module = random_module(num_nextn_predict_layers=depths)
    prompts = random_prompts(module.config.vocab_size, FIFTY)
    plain = module.generate(prompts, max_new_tokens=12)
    drafted = module.generate(prompts, max_new_tokens=12, speculate=3, prefill_chunk=5)
    assert drafted.tokens == plain.tokens
    assert drafted.statistics.acceptance < 0.3


def test_alone_or_in_a_batch_a_text_is_the_same_and_so_are_its_drafts() -> None:
    module = trained_module()
    prompts = [sequence[:length].tolist() for sequence, length in zip(language(6, 13, 300), FIFTY, strict=False)]
    together = module.generate(prompts, max_new_tokens=20, speculate=3, stop=[5])
    alone = [module.generate(prompt, max_new_tokens=20, speculate=3, stop=[5]) for prompt in prompts]
    assert together.tokens == [one.tokens[0] for one in alone]
    firsts = [one.statistics.accepted_at[:1] or [0] for one in alone]
    assert together.statistics.accepted_at[0] == pytest.approx(sum(accepted for (accepted,) in firsts), abs=2), (
        "only the last rounds of a batch may draft more than each alone"
    )


def test_drafts_are_those_of_depth_1_over_the_whole_text() -> None:
    """Against the module as it is trained, without a cache: first drafts, and those from its own output."""
    module = trained_module()
    model, mtp = module.model, module.model.mtp[0]
    seen: list[list[int]] = []
    original = Drafter.draft

    def draft(self: Drafter, num_drafts: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, probabilities = original(self, num_drafts)
        seen.append(tokens[0].tolist())
        return tokens, probabilities

    prompt = language(1, 9, 400)[0].tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "draft", draft)
        stream = module.stream(prompt, max_new_tokens=16, speculate=3, stop=[])
        text, ends = list(prompt), []
        for step in stream:
            text += step[0]
            ends.append(len(text))
    with torch.no_grad():
        for drafts, end in zip(seen, ends, strict=False):
            tokens = text[:end]
            h_1TD = hidden_of(model, tokens)[:, :-1]
            wanted = []
            for _ in drafts:
                after = model.embed_tokens(torch.tensor([tokens[1:]]))
                out, _ = mtp(h_1TD, after, h_1TD.new_zeros(1))
                tokens = [*tokens, int(model.lm_head(out)[0, -1].argmax())]
                wanted.append(tokens[-1])
                h_1TD = torch.cat((h_1TD, out[:, -1:]), dim=1)
            assert drafts == wanted
    assert len(seen) > 3


def hidden_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: found.append(output))  # type: ignore[union-attr,operator]
    model({"input_ids": torch.tensor([tokens])})
    hook.remove()
    return found[0]


@pytest.mark.parametrize("speculate", [1, 3])
def test_what_is_drawn_has_the_same_distribution(speculate: int) -> None:
    """The first four tokens after one prompt, over many texts, against the model's own probabilities of all pairs.

    Chi-square of the joint distribution of tokens 2 and 3, which drafting has a part in, given token 1.
    """
    module = trained_module()
    prompt = language(1, 6, 500)[0].tolist()
    settings = {"temperature": 1.5, "top_p": 0.9}
    count = 6000
    generated = module.generate(
        [prompt] * count,
        max_new_tokens=3,
        speculate=speculate,
        seed=11,
        stop=[],
        **settings,  # type: ignore[arg-type]
    )
    statistics = generated.statistics
    assert 0.1 < statistics.acceptance < 0.9, statistics
    exact = exact_distribution(prompt, **settings)
    observed = torch.zeros_like(exact)
    for text in generated.tokens:
        observed[tuple(text)] += 1
    assert not observed[exact == 0].any(), "a token outside of the nucleus was drawn"
    chi_square, degrees = chi_square_of(observed, exact * count)
    assert degrees > 30
    # mean and deviation of the chi-square distribution are the degrees, and the root of twice as many
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    wrong = exact_distribution(prompt, temperature=1.35, top_p=0.9)
    assert chi_square_of(observed, wrong * count)[0] > degrees + 8 * (2 * degrees) ** 0.5, "it would not be noticed"


@torch.no_grad()
def exact_distribution(prompt: list[int], *, temperature: float, top_p: float) -> torch.Tensor:
    """P of three tokens [V, V, V], from full forwards and a plain definition of the nucleus."""
    model = trained_module().model

    def next_token(texts: torch.Tensor) -> torch.Tensor:
        p = (model({"input_ids": texts})[:, -1] / temperature).softmax(-1)
        for row in p:
            total = 0.0
            for token in sorted(range(VOCABULARY), key=lambda token: -float(row[token])):
                before, total = total, total + float(row[token])
                if before >= top_p:
                    row[token] = 0
        return p / p.sum(-1, keepdim=True)

    every = torch.arange(VOCABULARY)
    start = torch.tensor([prompt])
    first = next_token(start)[0]
    ones = torch.cat((start.expand(VOCABULARY, -1), every[:, None]), dim=1)
    second = next_token(ones)
    twos = torch.cat((ones.repeat_interleave(VOCABULARY, 0), every.repeat(VOCABULARY)[:, None]), dim=1)
    third = next_token(twos).view(VOCABULARY, VOCABULARY, VOCABULARY)
    return first[:, None, None] * second[:, :, None] * third


def chi_square_of(observed: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Cells that expect fewer than 5 are one."""
    large = expected >= 5
    seen = torch.cat((observed[large], observed[~large].sum()[None]))
    want = torch.cat((expected[large], expected[~large].sum()[None]))
    seen, want = seen[want > 0], want[want > 0]
    return float(((seen - want) ** 2 / want).sum()), len(want) - 1
