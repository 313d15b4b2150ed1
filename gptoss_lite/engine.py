"""Continuous batching: requests in, ragged batches through the model, tokens out; knows nothing of text."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, BlockPool, Pages
from gptoss_lite.errors import RequestError
from gptoss_lite.model import PREFILL_TOKENS, GptOss
from gptoss_lite.ops.base import Array
from gptoss_lite.sampling import Draw, Sampled, SamplingParams

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to go on from it.

    tokens: prompt ids; seed: 64 bits that fix every draw; max_tokens: None means up to the model's context;
    stop_token_ids: ids that end the answer.
    """

    tokens: Sequence[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise RequestError(f"max_tokens is {self.max_tokens!r}: give an integer of at least 1, or None")


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


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request under way: its tokens so far, and its pages while it is running."""

    id: int
    request: Request
    pages: Pages
    tokens: list[int]
    end: int  # the most tokens it may come to
    cached_tokens: int | None = None
    scheduled: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.pages.length


class Engine:
    """Runs several requests in one ragged batch, step by step, over a shared paged cache.

    max_sequences: requests under way at once, more wait; step_tokens: tokens computed in one step, which
    bounds how long a long prompt holds up the answers beside it; cache_tokens: what the full-attention
    layers keep for all requests together, by default one model context, and so the most that one request may
    come to. When the cache runs out the youngest request steps back and is computed again later; on `cpu` its
    text does not change. Not thread-safe; see AsyncEngine.
    Raises RequestError for a limit below 1, OutOfMemoryError where the cache does not fit.
    """

    def __init__(
        self,
        model: GptOss,
        *,
        max_sequences: int = 16,
        step_tokens: int = PREFILL_TOKENS,
        cache_tokens: int | None = None,
    ) -> None:
        config = model.config
        cache_tokens = config.max_position_embeddings if cache_tokens is None else cache_tokens
        limits = {"max_sequences": max_sequences, "step_tokens": step_tokens, "cache_tokens": cache_tokens}
        for name, limit in limits.items():
            if type(limit) is not int or limit < 1:
                raise RequestError(f"{name} is {limit!r}: give an integer of at least 1")
        self.model = model
        self.context = min(cache_tokens, config.max_position_embeddings)
        self._max_sequences = max_sequences
        self._step_tokens = max(step_tokens, max_sequences)
        self._window = min(config.sliding_window, self.context)
        full_blocks = -(-cache_tokens // BLOCK_TOKENS)
        # Room for every running request, and as much again for the windows at which known prefixes end; never
        # more than the full layers have, for a sequence's sliding blocks are some of its full ones.
        windows = max_sequences * (self._window // BLOCK_TOKENS + 2) + self._step_tokens // BLOCK_TOKENS + 1
        sliding_blocks = min(2 * windows, full_blocks)
        self._cache = model.ops.new_cache(config, full_blocks, sliding_blocks)
        self._full, self._sliding = BlockPool(full_blocks), BlockPool(sliding_blocks)
        self._ids = count()
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # oldest first
        self._blocked = False  # the first that waits found no room, and none has been given back since

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

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
        pages = Pages(self._full, self._sliding, self._window)
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
        """Compute one batch; return an event for each request that came to a new token."""
        scheduled = self._schedule()
        if not scheduled:
            return []
        drawing = [sequence for sequence in scheduled if sequence.scheduled == sequence.pending]
        finish = self.model.begin(self._batch(scheduled), self._cache, list(map(_draw, drawing)))
        for sequence in scheduled:
            sequence.pages.advance(sequence.tokens, sequence.scheduled)
        return [self._accept(*pair) for pair in zip(drawing, finish(), strict=True)]

    def _schedule(self) -> list[_Sequence]:
        """Choose how many tokens each request computes: answers first, then prompts, oldest first."""
        for sequence in self._running:
            sequence.scheduled = 0
        for sequence in sorted(self._running, key=lambda s: s.pending > 1):
            if sequence in self._running:  # it may have stepped back for an older one
                self._continue(sequence)
        while self._waiting and self._budget and len(self._running) < self._max_sequences:
            if self._blocked or not self._admit(self._waiting[0]):
                break
        return [sequence for sequence in self._running if sequence.scheduled]

    @property
    def _budget(self) -> int:
        """Tokens that this step can still take."""
        return self._step_tokens - sum(sequence.scheduled for sequence in self._running)

    def _continue(self, sequence: _Sequence) -> None:
        """Reserve room for a request's next tokens; while there is too little, the youngest steps back."""
        granted = min(sequence.pending, self._budget)
        while not sequence.pages.reserve(granted):
            youngest = self._running.pop()
            youngest.pages.release()
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return
        sequence.scheduled = granted

    def _admit(self, sequence: _Sequence) -> bool:
        """Start the first request that waits, from as much of its beginning as the cache knows."""
        cached = sequence.pages.adopt_prefix(sequence.tokens)
        granted = min(sequence.pending, self._budget)
        if not sequence.pages.reserve(granted):
            sequence.pages.release()
            self._blocked = True
            return False
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
        sequence.scheduled = granted
        self._running.append(self._waiting.popleft())
        return True

    def _batch(self, scheduled: list[_Sequence]) -> Batch:
        tokens: list[int] = []
        positions: list[int] = []
        for sequence in scheduled:
            start, end = sequence.pages.length, sequence.pages.length + sequence.scheduled
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
        query_start = np.cumsum([0, *(sequence.scheduled for sequence in scheduled)], dtype=np.int32)
        done = [sequence.scheduled == sequence.pending for sequence in scheduled]
        return Batch(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            query_start=query_start,
            full_table=_table([sequence.pages.full for sequence in scheduled]),
            sliding_table=_table([sequence.pages.sliding for sequence in scheduled]),
            rows=query_start[1:][done] - 1,
        )

    def _accept(self, sequence: _Sequence, sampled: Sampled | Exception) -> TokenEvent:
        request = sequence.request
        counts = len(request.tokens), sequence.cached_tokens or 0
        if isinstance(sampled, Exception):
            self._remove(sequence)
            return TokenEvent(sequence.id, None, *counts, "error", sampled)
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
    return Draw(request.sampling, request.seed, 0, sequence.tokens, len(request.tokens))


def _table(rows: list[list[int]]) -> Array:
    """Pad block lists of several sequences to one int32 table (S, blocks)."""
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, blocks in zip(table, rows, strict=True):
        row[: len(blocks)] = blocks
    return table
