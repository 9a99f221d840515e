"""``TextDataModule``: text files as batches for Lightning.

    prepare_data     corpus ─► tokenizer ─► token cache          once on each node
    setup            documents ─► train and validation split ─► sequences
    train_dataloader sequences ─► the stream of samples ─► this data rank's share of every global batch

The place in the stream is all the state there is. It is computed from Lightning's own count of finished
batches, not from what was read: so neither worker processes, nor a loader that reads ahead, nor one
that is iterated on another rank of the pipeline can shift it, and a checkpoint may be written at
any time, after ``fit`` too. It goes on with another number of ranks, workers or batch size.
"""

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_dualpipe.data.batches import BatchSizeRamp, GlobalBatches, evaluation_shares
from lightning_dualpipe.data.cache import TokenCache, tokenised
from lightning_dualpipe.data.corpus import find_sources
from lightning_dualpipe.data.loaders import EvaluationLoader, Reader, TrainingLoader
from lightning_dualpipe.data.order import SampleOrder
from lightning_dualpipe.data.packing import PackedSequences, Runs, check_lengths, split_documents
from lightning_dualpipe.data.tokenizers import Tokenizer, load_tokenizer
from lightning_dualpipe.errors import ConfigurationError

__all__ = ["TextDataModule"]


class TextDataModule(LightningDataModule):
    """Text files, tokenised once and packed into sequences of equal length.

    Batches are ``{"input_ids": int64 [B, T], "labels": int64 [B, T]}``, where ``labels[:, i]`` is the token
    after ``input_ids[:, i]``. A resumed run reads what an uninterrupted one would have read.

    Args:
        path: a file, a folder, a glob, or a list of these: UTF-8 text, or .jsonl with one document a line.
            By default the library sources of the running Python, about 12 MB that every machine has.
        sequence_length: tokens in a sequence, T.
        batch_size: sequences per data rank in a step, B, as everywhere in Lightning.
        tokenizer: a Hugging Face tokenizer.json or a folder with one; by default the bytes of UTF-8
            (256 ids and a few special ones, a vocabulary of 264).
        eos_token: the token that ends a document, where the tokenizer's is not one of the usual names.
        seed: decides the order of the sequences and which documents are for validation.
        shuffle: read the training sequences in a new random order in each pass, or as they come.
        validation_fraction: how much of the tokens to hold out; 0 means no validation.
        batch_size_schedule: a training batch size that grows with the tokens consumed, instead of
            ``batch_size``, which then is for validation only.
        num_workers: processes that read ahead; 0 reads when a batch is asked for, which is fast on a local disk.
        text_key: where the text is in a line of .jsonl.
        cache_dir: where to keep the tokens; by default the user's cache folder.
    """

    def __init__(
        self,
        path: str | Path | list[str] | None = None,
        sequence_length: int = 512,
        *,
        batch_size: int = 16,
        tokenizer: str | Path | None = None,
        eos_token: str | None = None,
        seed: int = 0,
        shuffle: bool = True,
        validation_fraction: float = 0.05,
        batch_size_schedule: BatchSizeRamp | None = None,
        num_workers: int = 0,
        text_key: str = "text",
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(sequence_length, batch_size, validation_fraction, num_workers, tokenizer, eos_token)
        self.path = path
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.validation_fraction = validation_fraction
        self.batch_size_schedule = batch_size_schedule
        self.num_workers = num_workers
        self.text_key = text_key
        self.cache_dir = cache_dir
        self._tokenizer_file = tokenizer
        self._eos_token = eos_token
        self._tokenizer: Tokenizer | None = None
        self._cache: TokenCache | None = None
        self._splits: tuple[Runs, Runs] | None = None
        self._loader: TrainingLoader | None = None
        self._samples = 0  # consumed before there was a loader

    # ---- the corpus ---------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self._tokens()

    def setup(self, stage: str | None = None) -> None:
        self._cache = self._tokens()
        self._check_all_ranks_have(self._cache)
        self._splits = split_documents(
            self._cache.documents(), seed=self.seed, validation_fraction=self.validation_fraction
        )
        check_lengths(
            *self._splits,
            sequence_length=self.sequence_length,
            validation_fraction=self.validation_fraction,
            path=self.path,
        )
        if stage in (None, TrainerFn.FITTING):
            rank_zero_info(f"{self}")
            if self.trainer is not None and _steps_finished(self.trainer) == 0:  # a new run begins at the beginning
                self._loader, self._samples = None, 0

    def _tokens(self) -> TokenCache:
        sources = find_sources(self.path)
        return tokenised(sources, self.tokenizer, self.cache_dir, text_key=self.text_key, report=rank_zero_info)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_file, eos_token=self._eos_token)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; known without reading the corpus."""
        return self.tokenizer.vocab_size

    @property
    def num_train_tokens(self) -> int:
        return self._split(0).num_tokens

    @property
    def num_validation_tokens(self) -> int:
        return self._split(1).num_tokens

    def train_dataset(self) -> PackedSequences:
        """The training split, one sample of the stream after the other."""
        runs = self._split(0)
        order = SampleOrder(len(self._sequences(runs)), self.seed, self.shuffle)
        return self._sequences(runs, order=order)

    def validation_dataset(self, *, with_labels: bool = True) -> PackedSequences:
        """The validation split, in the order of the corpus."""
        return self._sequences(self._split(1), with_labels=with_labels)

    def _split(self, index: int) -> Runs:
        if self._splits is None:
            self.setup()
        assert self._splits is not None
        return self._splits[index]

    def _sequences(self, runs: Runs, **options: Any) -> PackedSequences:
        assert self._cache is not None, "the splits exist, so the cache does"
        return PackedSequences(self._cache, runs, self.sequence_length, **options)

    # ---- loaders ------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainingLoader:
        dataset = self.train_dataset()
        num_ranks, rank = self._data_ranks()
        size = self.batch_size_schedule or self.batch_size
        self._loader = TrainingLoader(
            dataset,
            GlobalBatches.of(size, sequence_length=self.sequence_length, num_ranks=num_ranks),
            self._reader(),
            rank=rank,
            start=self._consumed_samples(),
            steps_finished=None if self.trainer is None else partial(_steps_finished, self.trainer),
            repeat=getattr(self.trainer, "overfit_batches", 0) > 0,
        )
        if len(self._loader) == 0:
            raise ConfigurationError(
                f"the training split has {len(dataset)} sequences of {self.sequence_length} tokens, and one step takes "
                f"{self._loader.batches.size(0)}, for {num_ranks} data ranks together: choose a smaller batch_size, "
                "a smaller sequence_length or a larger corpus"
            )
        return self._loader

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        return self._evaluation(self.validation_dataset())

    def test_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """The validation split: a test on data held out from both needs a module of its own, with another path."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """The validation split without labels."""
        return self._evaluation(self.validation_dataset(with_labels=False))

    def _evaluation(self, dataset: PackedSequences) -> EvaluationLoader | list[EvaluationLoader]:
        if self.validation_fraction == 0:
            return []
        num_ranks, rank = self._data_ranks()
        shares = evaluation_shares(len(dataset), self.batch_size, num_ranks=num_ranks, rank=rank)
        return EvaluationLoader(dataset, shares, self._reader())

    def _reader(self) -> Reader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return Reader(num_workers=self.num_workers, pin_memory=on_gpu)  # else each transfer would wait for the GPU

    def _data_ranks(self) -> tuple[int, int]:
        """(number of data ranks, this one): the strategy knows which processes read different data."""
        if self.trainer is None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                rank_zero_warn("TextDataModule is used without a trainer: every process will read the same batches")
            return 1, 0
        kwargs = self.trainer.distributed_sampler_kwargs
        return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)

    def teardown(self, stage: str | None = None) -> None:
        if self._loader is not None:
            self._loader.close()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown()  # which Lightning does not call then

    # ---- the place in the stream --------------------------------------------------------------

    def _consumed_samples(self) -> int:
        return self._samples if self._loader is None else self._loader.consumed_samples()

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._consumed_samples(), "data": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # weights are looked at, not trained
        if state["data"] != self._fingerprint():
            rank_zero_warn(
                "The checkpoint was trained on other data (corpus, tokenizer, sequence_length, seed, shuffle or "
                f"validation_fraction differ): reading goes on with sample {state['samples']:,} of the new order."
            )
        self._loader, self._samples = None, state["samples"]

    def _fingerprint(self) -> str:
        """Equal where equal samples are equal sequences."""
        digest = self._cache.digest if self._cache is not None else None
        order = (digest, self.sequence_length, self.seed, self.shuffle, self.validation_fraction)
        return sha256(repr(order).encode()).hexdigest()[:16]

    # ---- checks -------------------------------------------------------------------------------

    def _check_all_ranks_have(self, cache: TokenCache) -> None:
        """Nodes may differ in their files, and Python's own sources in their version."""
        if self.trainer is None:
            return
        strategy = self.trainer.strategy
        same = strategy.broadcast(cache.digest) == cache.digest
        if not strategy.reduce_boolean_decision(same):  # so that every rank stops
            raise ConfigurationError(
                "the processes have different corpora: the same path must lead to the same text on every node, "
                f"here it leads to {cache.num_documents:,} documents, {cache.num_tokens:,} tokens (path={self.path})"
            )

    def __str__(self) -> str:
        if self._cache is None:
            return f"TextDataModule(path={self.path!r})"
        train, validation = (len(self._sequences(runs)) for runs in self._splits or ())
        return (
            f"TextDataModule: {self._cache.num_documents:,} documents, {self._cache.num_tokens:,} tokens; {train:,} "
            f"sequences of {self.sequence_length} to train and {validation:,} to validate"
        )


def _steps_finished(trainer: Trainer) -> int:
    """Batches that were trained on, over all runs that this one goes on from."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def _check_arguments(
    sequence_length: int,
    batch_size: int,
    validation_fraction: float,
    num_workers: int,
    tokenizer: str | Path | None,
    eos_token: str | None,
) -> None:
    problems = []
    if sequence_length < 1:
        problems.append(f"sequence_length={sequence_length}: at least 1 token is needed")
    if batch_size < 1:
        problems.append(f"batch_size={batch_size}: at least 1 sequence is needed")
    if not 0 <= validation_fraction < 1:
        problems.append(f"validation_fraction={validation_fraction}: from 0 (no validation) to less than 1")
    if num_workers < 0:
        problems.append(f"num_workers={num_workers}: 0 reads in the training process, more start workers")
    if eos_token is not None and tokenizer is None:
        problems.append(f"eos_token={eos_token!r} is for a tokenizer file; bytes have their own")
    if problems:
        raise ConfigurationError.of("TextDataModule cannot be set up", problems)
