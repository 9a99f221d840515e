import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_dualpipe.data import packing
from lightning_dualpipe.data.cache import DOCUMENT, TokenCache, tokenised
from lightning_dualpipe.data.corpus import find_sources
from lightning_dualpipe.data.order import SampleOrder, mix
from lightning_dualpipe.data.packing import PackedSequences, Runs, split_documents
from lightning_dualpipe.data.tokenizers import ByteTokenizer


def documents_of(lengths: list[int], *, first_id: int = 0) -> np.ndarray:
    documents = np.zeros(len(lengths), DOCUMENT)
    documents["end"] = np.cumsum(lengths)
    documents["id"] = np.arange(first_id, first_id + len(lengths))
    return documents


def tokens_of(runs: Runs, tokens: np.ndarray) -> list[int]:
    """The definition: the stretches of a split, one after the other."""
    lengths = np.diff(runs.ends, prepend=0)
    stretches = [tokens[start : start + length] for start, length in zip(runs.starts, lengths, strict=True)]
    return np.concatenate([np.empty(0, int), *stretches]).tolist()


def split_by_sorting(documents: np.ndarray, *, seed: int, validation_fraction: float) -> tuple[Runs, Runs]:
    """The definition: documents in the order of their hash fill the validation split, the last one with its end."""
    lengths = np.diff(documents["end"], prepend=0)
    wanted = round(int(lengths.sum()) * validation_fraction)
    by_hash = np.argsort(mix(documents["id"] ^ mix(np.array([seed], dtype=np.uint64))), kind="stable")
    before = np.cumsum(lengths[by_hash]) - lengths[by_hash]
    held_out = np.zeros_like(lengths)
    held_out[by_hash] = np.clip(wanted - before, 0, lengths[by_hash])
    starts = documents["end"] - lengths
    return Runs.of(starts, lengths - held_out), Runs.of(starts + lengths - held_out, held_out)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_the_splits_are_those_of_a_sort_by_hash(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(packing, "CHUNK", chunk)
    generator = np.random.default_rng(0)
    for seed, count in enumerate((1, 2, 50, 300)):
        documents = documents_of(generator.integers(1, 100, size=count).tolist())
        documents["id"] = generator.integers(0, 5 if seed % 2 else 1 << 63, size=count)  # names may repeat
        for fraction in (0.0, 0.001, 0.1, 0.5, 0.999):
            splits = split_documents(documents, seed=seed, validation_fraction=fraction)
            expected = split_by_sorting(documents, seed=seed, validation_fraction=fraction)
            for runs, definition in zip(splits, expected, strict=True):
                assert np.array_equal(runs.starts, definition.starts) and np.array_equal(runs.ends, definition.ends)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("lengths", [[100], [3, 50, 2], [7] * 40, [1000, 1, 1, 1, 1]], ids=str)
def test_the_splits_divide_the_tokens_and_validation_gets_its_fraction(lengths: list[int], fraction: float) -> None:
    tokens = np.arange(sum(lengths))
    for seed in range(10):
        splits = split_documents(documents_of(lengths), seed=seed, validation_fraction=fraction)
        train, validation = (tokens_of(runs, tokens) for runs in splits)
        assert sorted(train + validation) == tokens.tolist()
        assert train == sorted(train) and validation == sorted(validation)  # in the order of the corpus
        assert len(validation) == round(sum(lengths) * fraction)
        assert [runs.num_tokens for runs in splits] == [len(train), len(validation)]


def test_at_most_one_document_is_cut_and_its_end_is_for_validation() -> None:
    lengths = [13] * 50
    train, validation = split_documents(documents_of(lengths), seed=0, validation_fraction=0.11)
    owner = np.repeat(np.arange(50), lengths)
    tokens = np.arange(len(owner))
    shared = set(owner[tokens_of(train, tokens)]) & set(owner[tokens_of(validation, tokens)])
    assert len(shared) == 1
    (cut,) = shared
    held_out = [token for token in tokens_of(validation, tokens) if owner[token] == cut]
    assert held_out == list(range(13 * (cut + 1) - round(650 * 0.11) % 13, 13 * (cut + 1)))
    single = split_documents(documents_of([100]), seed=0, validation_fraction=0.1)
    assert tokens_of(single[1], np.arange(100)) == list(range(90, 100))


def test_the_seed_decides_and_nothing_else() -> None:
    documents = documents_of([5] * 200)
    chosen = [split_documents(documents, seed=seed, validation_fraction=0.1)[1].starts.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_documents_that_come_or_go_hardly_move_the_others() -> None:
    def held_out(documents: np.ndarray) -> set[int]:
        validation = split_documents(documents, seed=0, validation_fraction=0.1)[1]
        owner = np.repeat(documents["id"], np.diff(documents["end"], prepend=0))
        return set(owner[tokens_of(validation, np.arange(len(owner)))].tolist())

    before, after = held_out(documents_of([5] * 1000)), held_out(documents_of([5] * 1010, first_id=0))
    assert len(before) == 100
    assert len(before - after) <= 3


def test_stretches_that_touch_are_one_run() -> None:
    train, _ = split_documents(documents_of([5] * 1000), seed=0, validation_fraction=0.05)
    assert len(train.starts) <= 51


def test_reading_equals_slicing_the_whole() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 1000, size=500)
    starts = np.arange(0, 500, 10)
    runs = Runs.of(starts, generator.integers(0, 11, size=50))
    whole = tokens_of(runs, tokens)
    for first in range(len(whole)):
        for length in (0, 1, 2, 30, len(whole) - first):
            out = np.full(min(length, len(whole) - first), -1)
            runs.read(tokens, first, out)
            assert out.tolist() == whole[first : first + length]


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    for index in range(30):
        (tmp_path / f"{index:02}.txt").write_text(f"document {index}. " * (index % 7 + 1))
    return tokenised(find_sources(tmp_path), ByteTokenizer(), tmp_path / "cache")


@pytest.mark.parametrize("sequence_length", [1, 7, 64])
def test_every_token_but_the_first_is_predicted_once(cache: TokenCache, sequence_length: int) -> None:
    train, _ = split_documents(cache.documents(), seed=0, validation_fraction=0.2)
    dataset = PackedSequences(cache, train, sequence_length)
    whole = tokens_of(train, cache.tokens())
    batch = dataset[range(len(dataset))]
    used = len(dataset) * sequence_length
    assert used + sequence_length >= len(whole) - 1 >= used
    assert batch["input_ids"].flatten().tolist() == whole[:used]
    assert batch["labels"].flatten().tolist() == whole[1 : used + 1]
    for tensor in batch.values():
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert tensor.shape == (len(dataset), sequence_length)


def test_samples_come_in_the_order_given(cache: TokenCache) -> None:
    runs = split_documents(cache.documents(), seed=0, validation_fraction=0)[0]
    plain = PackedSequences(cache, runs, 16)
    order = SampleOrder(len(plain), seed=5)
    shuffled = PackedSequences(cache, runs, 16, order=order)
    samples = range(len(plain) - 3, len(plain) + 3)  # across two passes
    expected = [plain[range(index, index + 1)]["input_ids"][0] for index in order(np.array(samples)).tolist()]
    assert torch.equal(shuffled[samples]["input_ids"], torch.stack(expected))


def test_without_labels_there_are_inputs_only(cache: TokenCache) -> None:
    runs = split_documents(cache.documents(), seed=0, validation_fraction=0)[0]
    assert set(PackedSequences(cache, runs, 16, with_labels=False)[range(2)]) == {"input_ids"}


def test_a_copy_for_a_worker_carries_no_tokens(cache: TokenCache) -> None:
    runs = split_documents(cache.documents(), seed=0, validation_fraction=0)[0]
    dataset = PackedSequences(cache, runs, 16)
    batch = dataset[range(2)]
    data = pickle.dumps(dataset)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data)[range(2)]["input_ids"], batch["input_ids"])


def test_fewer_tokens_than_a_sequence_are_no_sequence() -> None:
    documents = documents_of([10])
    for length, expected in ((1, 9), (9, 1), (10, 0), (11, 0)):
        runs, nothing = split_documents(documents, seed=0, validation_fraction=0)
        assert len(PackedSequences(None, runs, length)) == expected  # type: ignore[arg-type]
        assert len(PackedSequences(None, nothing, length)) == 0  # type: ignore[arg-type]
