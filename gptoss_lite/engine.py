"""Continuous batching: requests in, ragged batches through the model, tokens out; knows nothing of text."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Literal

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, FULL, MAX_SEQUENCES, SLIDING, BlockPool, Pages, pool_blocks
from gptoss_lite.errors import OutOfMemoryError, RequestError
from gptoss_lite.model import GptOss
from gptoss_lite.ops.base import Array, Pending
from gptoss_lite.sampling import Draw, Sampled, SamplingParams

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to go on from it.

    tokens: prompt ids; seed: 64 bits that fix every draw; max_tokens: None means up to the model's context;
    stop_token_ids: ids that end the answer. choice: which of several answers with one seed this is, from 0.
    cache_salt: only requests with the same one share what the cache knows.
    """

    tokens: Sequence[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    choice: int = 0
    cache_salt: bytes = b""

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise RequestError(f"max_tokens is {self.max_tokens!r}: give an integer of at least 1, or None")
        if type(self.seed) is not int or not 0 <= self.seed < 2**64:
            raise RequestError(f"seed is {self.seed!r}: give an integer from 0 to 2^64 - 1")
        if type(self.choice) is not int or not 0 <= self.choice < 2**32:
            raise RequestError(f"choice is {self.choice!r}: give an integer from 0 to 2^32 - 1")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token of one request, or its failure.

    cached_tokens: how much of the prompt was already in the cache; error: set when finish_reason is "error",
    and `sampled` then is None.
    """

    request_id: int
    sampled: Sampled | None
    prompt_tokens: int
    cached_tokens: int
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Statistics:
    """What an engine has done since it was made.

    prompt_tokens: of all requests begun; of them cached_tokens were known, prefilled_tokens computed so far.
    recomputed_tokens: computed again after a request had to step back, which happened `preemptions` times.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request under way: its tokens so far, and its pages while it is running."""

    id: int
    request: Request
    pages: Pages
    tokens: list[int]
    end: int  # the most tokens it may come to
    cached_tokens: int | None = None
    computed: int = 0  # the most tokens it ever had keys and values of
    scheduled: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.pages.length


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch under way: the sequences that it draws a token for, in order, and what waits for the tokens."""

    drawing: list[_Sequence]
    finish: Pending


class Engine:
    """Runs several requests in one ragged batch, step by step, over a shared paged cache.

    max_sequences: requests under way at once, more wait; step_tokens: tokens computed in one step; while
    answers are under way prompts get a small part of it, the device's own, so that none holds them up for
    long, and among prompts each has its share, so that a short one need not wait for a long one. A prompt
    that begins like one being computed waits for that, and then finds it in the cache. cache_tokens: what the full-attention
    layers keep for all requests together, by default what the model was loaded for, and so the most that one
    request may come to. When the cache runs out the youngest request steps back and is computed again later;
    on `cpu` its text does not change. Not thread-safe; see AsyncEngine.
    Raises RequestError for a limit below 1, OutOfMemoryError where the cache does not fit.
    """

    def __init__(
        self,
        model: GptOss,
        *,
        max_sequences: int = MAX_SEQUENCES,
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        config = model.config
        step_tokens = model.ops.step_tokens if step_tokens is None else step_tokens
        cache_tokens = model.cache_tokens if cache_tokens is None else cache_tokens
        full_blocks, sliding_blocks = pool_blocks(config, cache_tokens, max_sequences, step_tokens)
        self.model = model
        self.context = min(cache_tokens, config.max_position_embeddings)
        self.statistics = Statistics()
        self.max_sequences = max_sequences
        self._step_tokens = max(step_tokens, max_sequences)
        self._window = min(config.sliding_window, self.context)
        self._cache = model.ops.new_cache(config, full_blocks, sliding_blocks)
        self._full, self._sliding = BlockPool(full_blocks), BlockPool(sliding_blocks)
        self._ids = count()
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # oldest first
        self._current: _Batch | None = None  # begun, its tokens not yet accepted
        self._ahead: _Batch | None = None  # begun after that one, while its tokens were still unknown
        self._blocked = False  # the first that waits found no room, and none has been given back since

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in it, or for room in the cache."""
        return len(self._waiting)

    @property
    def free_tokens(self) -> int:
        """Tokens whose keys and values the full-attention layers could take in, forgetting all that is idle."""
        return self._full.available * BLOCK_TOKENS

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; raises RequestError if the model cannot take its prompt."""
        self.model.check_prompt(request.tokens)
        tokens = list(request.tokens)
        room = self.context - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens: no room for an answer in {self.context}"
            )
        end = len(tokens) + (room if request.max_tokens is None else min(request.max_tokens, room))
        pages = Pages(self._full, self._sliding, self._window, request.cache_salt)
        sequence = _Sequence(next(self._ids), request, pages, tokens, end)
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Drop a request wherever it stands and free its blocks; an id that has finished is ignored."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.id == request_id:
                self._remove(sequence)

    def computed(self, request_id: int) -> int:
        """Tokens of a request that the cache holds by now; 0 while it waits and once it has finished."""
        return next((s.pages.length for s in self._running if s.id == request_id), 0)

    def step(self) -> list[TokenEvent]:
        """Compute one batch; return an event for each request that came to a new token.

        Where the device can, the batch after it is begun before its tokens are waited for.
        """
        batch = self._current
        if batch is None or not any(sequence in self._running for sequence in batch.drawing):
            batch, self._ahead = self._begin(), None
        if batch is None:
            return []
        self._current = batch
        if self._ahead is None:
            self._ahead = self._begin_ahead(batch)
        found = batch.finish()  # an interrupt may end this wait: the next call waits again
        self._current, self._ahead = self._ahead, None
        events = [
            self._accept(sequence, sampled)
            for sequence, sampled in zip(batch.drawing, found, strict=True)
            if sequence in self._running  # begun ahead, it may have ended since
        ]
        if self._current is not None:
            for sequence in self._current.drawing:
                if sequence in self._running:
                    sequence.pages.advance(sequence.tokens, 1)
        return events

    def _begin(self) -> _Batch | None:
        """Begin the next batch of what is known."""
        scheduled = self._schedule()
        if not scheduled:
            return None
        drawing = [sequence for sequence in scheduled if sequence.scheduled == sequence.pending]
        tokens = [s.tokens[s.pages.length : s.pages.length + s.scheduled] for s in scheduled]
        rows = [sequence.scheduled == sequence.pending for sequence in scheduled]
        batch = self._batch(scheduled, tokens, rows)
        finish = self.model.begin(batch, self._cache, list(map(_draw, drawing)))
        self.statistics.steps += 1
        for sequence in scheduled:
            self._count(sequence)
            sequence.pages.advance(sequence.tokens, sequence.scheduled)
        return _Batch(drawing, finish)

    def _count(self, sequence: _Sequence) -> None:
        """Note what is about to be stored of a request."""
        start, end = sequence.pages.length, sequence.pages.length + sequence.scheduled
        known = max(start, sequence.computed)
        self.statistics.recomputed_tokens += min(end, known) - start
        self.statistics.prefilled_tokens += max(0, min(end, len(sequence.request.tokens)) - known)
        sequence.computed = max(end, known)

    def _begin_ahead(self, last: _Batch) -> _Batch | None:
        """Begin the batch after `last`, whose tokens only the device knows; None where that cannot be done.

        That is when all that runs is drawing, nothing that waits could join it, and none of it is sure to end
        with this token.
        """
        drawing, ahead = last.drawing, self.model.ops.can_run_ahead
        draws = [replace(_draw(sequence), ahead=1) for sequence in drawing]
        admitting = self._waiting and len(self._running) < self.max_sequences and not self._blocked
        if admitting or drawing != self._running or not all(map(ahead, draws)):
            return None
        if any(len(sequence.tokens) + 1 >= sequence.end for sequence in drawing):
            return None
        if not all(sequence.pages.reserve(1) for sequence in drawing):
            return None
        # Token -1 - r stands for what row r of the last batch drew.
        batch = self._batch(drawing, [[-1 - row] for row in range(len(drawing))], [True] * len(drawing))
        try:
            begun = _Batch(drawing, self.model.begin(batch, self._cache, draws))
        except OutOfMemoryError:  # the last batch's tokens are not to be lost: the next call meets it again
            return None
        self.statistics.steps += 1
        return begun

    def _schedule(self) -> list[_Sequence]:
        """Choose how many tokens each request computes: one of each answer first, then what prompts share."""
        for sequence in self._running:
            sequence.scheduled = 0
        answering = [sequence for sequence in self._running if sequence.pending == 1]
        for sequence in answering:
            self._grant(sequence, 1)
        self._admit_waiting()
        prompts = [sequence for sequence in self._running if not sequence.scheduled]
        budget = min(self._budget, self.model.ops.shared_step_tokens) if answering else self._budget
        for place, sequence in enumerate(sorted(prompts, key=lambda s: s.pending)):
            share = -(-budget // (len(prompts) - place))  # what the small ones leave goes to the others
            self._grant(sequence, min(sequence.pending, share))
            budget -= sequence.scheduled
        return [sequence for sequence in self._running if sequence.scheduled]

    @property
    def _budget(self) -> int:
        """Tokens that this step can still take."""
        return self._step_tokens - sum(sequence.scheduled for sequence in self._running)

    def _grant(self, sequence: _Sequence, count: int) -> None:
        """Reserve room for a request's next tokens; while there is too little, the youngest steps back."""
        if not count or sequence not in self._running:  # it may have stepped back for an older one
            return
        while not sequence.pages.reserve(count):
            youngest = self._running.pop()
            youngest.pages.release()
            youngest.scheduled = 0
            self._waiting.appendleft(youngest)
            self.statistics.preemptions += 1
            self._blocked = bool(self._running)
            if youngest is sequence:
                return
        sequence.scheduled = count

    def _admit_waiting(self) -> None:
        """Start what waits, in its order, while there are places and room."""
        for sequence in list(self._waiting):
            if self._blocked or not self._budget or len(self._running) == self.max_sequences:
                return
            if not self._awaits(sequence):
                self._admit(sequence)

    def _awaits(self, sequence: _Sequence) -> bool:
        """Whether a running request is about to compute the first block that this one would have to."""
        index = sequence.pages.known_blocks(sequence.tokens)
        end = (index + 1) * BLOCK_TOKENS
        if end >= len(sequence.tokens):  # it would be no block of a known beginning
            return False
        name = sequence.pages.name(index, sequence.tokens)
        return any(
            other.pages.length < end <= len(other.tokens) and other.pages.name(index, other.tokens) == name
            for other in self._running
        )

    def _admit(self, sequence: _Sequence) -> None:
        """Start a request from as much of its beginning as the cache knows, if all of it has room."""
        cached = sequence.pages.adopt_prefix(sequence.tokens)
        needed = sum(other.pages.missing(other.pending) for other in [*self._running, sequence])
        if self._running and self._full.available < needed:
            sequence.pages.release()
            self._blocked = True
            return
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed = cached
            self.statistics.prompt_tokens += len(sequence.tokens)
            self.statistics.cached_tokens += cached
        self._waiting.remove(sequence)
        self._running.append(sequence)

    def _batch(self, sequences: list[_Sequence], tokens: list[list[int]], drawing: list[bool]) -> Batch:
        """Lay the next tokens of some sequences end to end; those that are drawing want their last row."""
        starts = [sequence.pages.length for sequence in sequences]
        positions = [range(start, start + len(part)) for start, part in zip(starts, tokens, strict=True)]
        query_start = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        return Batch(
            tokens=np.array(list(chain.from_iterable(tokens)), np.int32),
            positions=np.array(list(chain.from_iterable(positions)), np.int32),
            query_start=query_start,
            full_table=_table([sequence.pages.table(FULL) for sequence in sequences]),
            sliding_table=_table([sequence.pages.table(SLIDING) for sequence in sequences]),
            rows=query_start[1:][drawing] - 1,
            decoding=np.array([s.pages.length >= len(s.request.tokens) for s in sequences])
            & (np.diff(query_start) == 1),
        )

    def _accept(self, sequence: _Sequence, sampled: Sampled | Exception) -> TokenEvent:
        request = sequence.request
        counts = len(request.tokens), sequence.cached_tokens or 0
        if isinstance(sampled, Exception):
            self._remove(sequence)
            return TokenEvent(sequence.id, None, *counts, "error", sampled)
        self.statistics.generated_tokens += 1
        sequence.tokens.append(sampled.token)
        reason: FinishReason | None = None
        if sampled.token in request.stop_token_ids:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.end:
            reason = "length"
        if reason is not None:
            self._remove(sequence)
        return TokenEvent(sequence.id, sampled, *counts, reason)

    def _remove(self, sequence: _Sequence) -> None:
        sequence.pages.release()
        self._blocked = False
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)


def _draw(sequence: _Sequence) -> Draw:
    request = sequence.request
    return Draw(request.sampling, request.seed, request.choice, sequence.tokens, len(request.tokens))


def _table(rows: list[Array]) -> Array:
    """Pad block lists of several sequences to one int32 table (S, blocks)."""
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, blocks in zip(table, rows, strict=True):
        row[: len(blocks)] = blocks
    return table
