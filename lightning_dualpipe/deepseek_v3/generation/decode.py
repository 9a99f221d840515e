"""From a request to tokens: read the prompts, then rounds of drafting, running the model, and verifying.

    prompts      sorted by length, longest first, and read in chunks; those that are over leave:

                 chunk 0   chunk 1   chunk 2
                 a a a a   a a a a   a a           two sequences in chunk 1, one in chunk 2
                 b b b b   b b x x                 x: padding, which is written over later
                 c c c

    a round      last token and K drafts ─► model ─► p at K + 1 places ─► accept 0..K, choose one more

Sequences accept different numbers of drafts, and go on from different positions. One that has ended leaves the
batch. Without speculation K is 0, and the same round chooses one token.

Shapes: B sequences, S positions, K drafts, J = K + 1, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_dualpipe.deepseek_v3.generation.cache import Places
from lightning_dualpipe.deepseek_v3.generation.forward import hidden_states, new_cache
from lightning_dualpipe.deepseek_v3.generation.request import Request
from lightning_dualpipe.deepseek_v3.generation.sampling import Sampler
from lightning_dualpipe.deepseek_v3.generation.speculate import Drafter
from lightning_dualpipe.deepseek_v3.model import Transformer

__all__ = ["Generation", "Statistics", "decode"]

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class Statistics:
    """Counts over all sequences."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    """Runs of the model after the prompt, counted once for each sequence in the batch."""
    drafted_at: list[int] = field(default_factory=list)
    """Drafts that were made, by place: first drafts of a round, second, ..."""
    accepted_at: list[int] = field(default_factory=list)
    """How many of these were accepted, and so were all before them."""

    @property
    def drafted(self) -> int:
        return sum(self.drafted_at)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance(self) -> float:
        """Accepted of drafted tokens; not a number where none were drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """Tokens chosen by one run of the model, 1 without speculation."""
        return 1 + self.accepted / self.rounds if self.rounds else float("nan")


@dataclass(slots=True)
class Generation:
    """What was generated, in the order of the prompts. ``tokens`` include those that ended a text."""

    tokens: list[list[int]]
    finish_reasons: list[FinishReason | None]
    """``stop``, or ``length`` where ``max_new_tokens`` were reached; None while it goes on."""
    statistics: Statistics

    @classmethod
    def of(cls, request: Request) -> Generation:
        num_prompts = len(request.prompts)
        prompt_tokens = sum(map(len, request.prompts))
        return cls([[] for _ in range(num_prompts)], [None] * num_prompts, Statistics(prompt_tokens))


@torch.no_grad()
def decode(model: Transformer, request: Request, generation: Generation) -> Iterator[list[list[int]]]:
    """Add to ``generation`` round by round; yields the new tokens of each prompt, in the order of the prompts."""
    batch = _Batch(model, request, generation)
    tokens_B = batch.read_prompts()
    yield batch.say(tokens_B.unsqueeze(1).tolist())
    while batch.sequences:
        yield batch.round()


class _Batch:
    """The sequences that go on. ``self.sequences[b]`` is the prompt of row b."""

    def __init__(self, model: Transformer, request: Request, generation: Generation) -> None:
        self.model, self.request, self.generation = model, request, generation
        self.device = model.lm_head.weight.device
        self.sampler = Sampler(request.temperature, request.top_p, request.top_k, request.new_generator(self.device))
        prompts = request.prompts
        self.sequences = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        longest = len(prompts[self.sequences[0]])
        slots, count = longest + request.max_new_tokens + request.speculate, len(prompts)
        self.cache = new_cache(model, model.config.num_hidden_layers, count, max_slots=slots)
        slots_of_drafts = slots + 2 * request.speculate  # drafts may go on from where a sequence has just left
        self.drafter = Drafter(model, self.sampler, count, max_slots=slots_of_drafts) if request.speculate else None
        self.last_B = torch.zeros(count, dtype=torch.int64, device=self.device)
        """Chosen, and not yet read by the model: the token of position ``lengths[b]``."""
        self.lengths = [len(prompts[index]) for index in self.sequences]
        self.lengths_B = torch.tensor(self.lengths, device=self.device)

    # ---- prompts ------------------------------------------------------------------------------

    def read_prompts(self) -> Tensor:
        """Fill the caches; returns the first new tokens [B]."""
        longest, count = self.lengths[0], len(self.lengths)
        prompts = [self.request.prompts[index] for index in self.sequences]
        padded = [prompt + [0] * (longest + 1 - len(prompt)) for prompt in prompts]
        tokens_BT = torch.tensor(padded, device=self.device)
        last_BD = self.model.norm.weight.new_zeros(count, self.model.config.hidden_size)
        for start in range(0, longest, self.request.prefill_chunk):
            stop = min(start + self.request.prefill_chunk, longest)
            here = sum(length > start for length in self.lengths)
            places = Places.of(tokens_BT.new_full((here,), start), stop - start, stop)
            h_BSD = hidden_states(self.model, tokens_BT[:here, start:stop], places, self.cache)
            if self.drafter is not None:
                self.drafter.read(h_BSD, tokens_BT[:here, start + 1 : stop + 1], places)
            for row in range(here):
                if self.lengths[row] <= stop:
                    last_BD[row] = h_BSD[row, self.lengths[row] - 1 - start]
        h_B1D = last_BD.unsqueeze(1)
        self.last_B = self.sampler.choose(self.sampler.probabilities(self.model.lm_head(h_B1D))).squeeze(1)
        if self.drafter is not None:
            places = Places.of(self.lengths_B - 1, 1, longest)
            self.drafter.follow(h_B1D, self.last_B.unsqueeze(1), places, torch.zeros_like(self.last_B))
        return self.last_B

    # ---- rounds -------------------------------------------------------------------------------

    def round(self) -> list[list[int]]:
        num_drafts = min(self.request.speculate, max(self._missing(index) for index in self.sequences) - 1)
        tokens_BJ, q_BKV = self._with_drafts(num_drafts)
        places = Places.of(self.lengths_B, num_drafts + 1, max(self.lengths) + num_drafts + 1)
        h_BJD = hidden_states(self.model, tokens_BJ, places, self.cache)
        p_BJV = self.sampler.probabilities(self.model.lm_head(h_BJD))
        drafts_BK = tokens_BJ[:, 1:]
        if q_BKV is None:
            accepted_B, next_B = torch.zeros_like(self.last_B), self.sampler.choose(p_BJV[:, 0])
        else:
            accepted_B, next_B = self.sampler.verify(drafts_BK, q_BKV, p_BJV)
        following_BJ = torch.cat((drafts_BK, next_B.unsqueeze(1)), dim=1)
        following_BJ.scatter_(1, accepted_B.unsqueeze(1), next_B.unsqueeze(1))
        if self.drafter is not None:
            self.drafter.follow(h_BJD, following_BJ, places, accepted_B)
        self.last_B = next_B
        self.lengths_B = self.lengths_B + accepted_B + 1

        accepted = accepted_B.tolist()  # the only time that the host waits for what was computed
        self.lengths = [length + count + 1 for length, count in zip(self.lengths, accepted, strict=True)]
        self._count(num_drafts, accepted)
        chosen = zip(following_BJ.tolist(), accepted, strict=True)
        return self.say([tokens[: count + 1] for tokens, count in chosen])

    def _with_drafts(self, num_drafts: int) -> tuple[Tensor, Tensor | None]:
        last_B1 = self.last_B.unsqueeze(1)
        if self.drafter is None or num_drafts == 0:
            return last_B1, None
        drafts_BK, q_BKV = self.drafter.draft(num_drafts)
        return torch.cat((last_B1, drafts_BK), dim=1), q_BKV

    def _missing(self, index: int) -> int:
        return self.request.max_new_tokens - len(self.generation.tokens[index])

    def _count(self, num_drafts: int, accepted: list[int]) -> None:
        statistics = self.generation.statistics
        statistics.rounds += len(accepted)
        for place in range(num_drafts):
            if place == len(statistics.drafted_at):
                statistics.drafted_at.append(0)
                statistics.accepted_at.append(0)
            statistics.drafted_at[place] += len(accepted)
            statistics.accepted_at[place] += sum(count > place for count in accepted)

    # ---- texts --------------------------------------------------------------------------------

    def say(self, tokens_of_rows: list[list[int]]) -> list[list[int]]:
        """Append tokens, as far as they are wanted; sequences that have ended leave the batch."""
        said: list[list[int]] = [[] for _ in self.request.prompts]
        for index, tokens in zip(self.sequences, tokens_of_rows, strict=True):
            said[index] = self._say(index, tokens)
        going = [row for row, index in enumerate(self.sequences) if self.generation.finish_reasons[index] is None]
        if len(going) < len(self.sequences):
            self._keep(going)
        return said

    def _say(self, index: int, tokens: list[int]) -> list[int]:
        text = self.generation.tokens[index]
        for count, token in enumerate(tokens, start=1):
            text.append(token)
            self.generation.statistics.new_tokens += 1
            stopped = self.request.ends(text)
            if stopped or len(text) == self.request.max_new_tokens:
                self.generation.finish_reasons[index] = "stop" if stopped else "length"
                return tokens[:count]
        return tokens

    def _keep(self, rows: list[int]) -> None:
        self.sequences = [self.sequences[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        if rows:
            index = torch.tensor(rows, device=self.device)
            self.last_B, self.lengths_B = self.last_B[index], self.lengths_B[index]
            self.cache.keep(index)
            if self.drafter is not None:
                self.drafter.keep(index)
