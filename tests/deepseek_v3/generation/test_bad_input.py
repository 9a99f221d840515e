"""What cannot be generated is refused at once, with every reason."""

from typing import Any

import lightning as L
import pytest
import torch

from lightning_dualpipe import ConfigurationError, DeepSeekV3, DualPipeStrategy
from tests.deepseek_v3.generation.models import random_module
from tests.ranks import run_ranks
from tests.strategy.runs import QUIET, SHAPE, pretend_torchrun

WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no_prompt": ([], {}, r"there are no prompts"),
    "empty_prompt": ([[1], []], {}, r"prompt 1 is empty; a model continues at least one token"),
    "empty_tensor": (torch.zeros(1, 0, dtype=torch.int64), {}, r"the prompt is empty"),
    "text": ("import os", {}, r"str 'import os' is no prompt: give token ids.*load_tokenizer\(\) makes them of text"),
    "texts": (["import os"], {}, r"str 'import os' among the prompts is no prompt"),
    "floats": (torch.rand(3), {}, r"a tensor \[3\] of torch.float32 is no prompt"),
    "numbers": ([1, 2.5], {}, r"is no prompt"),
    "three_dimensions": (torch.ones(1, 1, 1, dtype=torch.int64), {}, r"a tensor \[1, 1, 1\] of torch.int64"),
    "beyond_the_vocabulary": ([3, 29], {}, r"token id 29, the ids of this model are 0 to 28 \(vocab_size\)"),
    "negative": ([-1], {}, r"token id -1"),
    "too_long": (
        [1] * 60,
        {"max_new_tokens": 5},
        r"60 tokens, with max_new_tokens=5 that exceeds max_position_embeddings=64.*'max_position_embeddings': 65",
    ),
    "nothing_new": ([1], {"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
    "cold": ([1], {"temperature": -0.5}, r"temperature=-0.5 must be 0"),
    "no_temperature": ([1], {"temperature": float("nan")}, r"temperature=nan must be 0"),
    "top_p_0": ([1], {"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must be above 0 and at most 1"),
    "top_p_above_1": ([1], {"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5 must be above 0 and at most 1"),
    "top_k_0": ([1], {"temperature": 1.0, "top_k": 0}, r"top_k=0 must be at least 1"),
    "without_effect": ([1], {"top_p": 0.9}, r"top_p=0.9 and top_k=None have no effect at temperature=0"),
    "fewer_than_no_drafts": ([1], {"speculate": -1}, r"speculate=-1 must be at least 0"),
    "no_chunk": ([1], {"prefill_chunk": 0}, r"prefill_chunk=0 must be at least 1"),
    "stop_beyond": ([1], {"stop": [29]}, r"stop=\[29\] can never be generated"),
    "stop_nothing": ([1], {"stop": [[]]}, r"stop=\[\] can never be generated"),
    "stop_text": ([1], {"stop": "\n"}, r"stop='\\n' is neither a token id nor a sequence of token ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_wrong_argument_has_its_message(case: str) -> None:
    prompts, options, message = WRONG[case]
    module = random_module(max_position_embeddings=64)
    module.model.forward = lambda *_: pytest.fail("the model was run")  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match=message):
        module.generate(prompts, **{"max_new_tokens": 2, **options})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        random_module().generate([[99], []], temperature=-1, top_p=2, speculate=-3)
    said = str(refused.value)
    assert said.startswith("this cannot be generated:")
    assert all(
        what in said for what in ("token id 99", "prompt 1 is empty", "temperature=-1", "top_p=2", "speculate=-3")
    )


def test_drafts_need_multi_token_prediction() -> None:
    module = random_module(num_nextn_predict_layers=0)
    with pytest.raises(ConfigurationError, match=r"speculate=2 needs multi-token prediction.*set speculate=0"):
        module.generate([1], speculate=2)


def test_a_model_without_numbers_is_refused() -> None:
    module = DeepSeekV3(config=random_module().config)
    with torch.device("meta"), pytest.raises(ConfigurationError, match="meta device"):
        module.generate([1])


@pytest.mark.parametrize(
    "sizes",
    [{"pipeline_parallel_size": 2, "schedule": "1f1b"}, {"pipeline_parallel_size": 1, "expert_parallel_size": 2}],
    ids=["pipeline", "experts"],
)
def test_a_model_that_is_spread_over_ranks_is_refused_on_each_of_them(sizes: dict[str, Any]) -> None:
    # dualpipe on two ranks would hold the whole model on each
    for said in run_ranks(2, generate_in_a_trainer, sizes):
        assert "this rank holds a part of the model only (" in said
        assert "elsewhere), and generation needs all of it: save_pretrained(directory) on all ranks" in said


def generate_in_a_trainer(rank: int, sizes: dict[str, Any]) -> str:
    pretend_torchrun(rank, 2)
    module = DeepSeekV3("tiny", {**SHAPE, "num_hidden_layers": 4})  # type: ignore[arg-type,typeddict-item]
    trainer = L.Trainer(strategy=DualPipeStrategy(**sizes), accelerator="cpu", devices=2, max_steps=1, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader(Samples(), batch_size=4))
    try:
        module.generate([1, 2, 3], max_new_tokens=2)
    except ConfigurationError as error:
        return str(error)
    return "generated"


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(9) + index
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}
