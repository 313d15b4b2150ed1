"""Continuous batching: requests in, ragged batches through the model, tokens out; knows nothing of text."""

from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, FULL, MAX_SEQUENCES, SLIDING, BlockPool, pool_blocks
from gptoss_lite.errors import OutOfMemoryError, RequestError
from gptoss_lite.model import GptOss
from gptoss_lite.ops.base import Array, Pending
from gptoss_lite.request import FinishReason, Request, TokenEvent
from gptoss_lite.sampling import Draw, Sampled
from gptoss_lite.scheduler import Scheduler, Sequence, Statistics

__all__ = ["Engine", "FinishReason", "Request", "TokenEvent"]


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch under way: the sequences that it draws a token for, in order, and what waits for the tokens."""

    drawing: list[Sequence]
    finish: Pending


class Engine:
    """Runs several requests in one ragged batch, step by step, over a shared paged cache.

    max_sequences: requests under way at once, more wait; step_tokens: tokens computed in one step; while
    answers are under way prompts get a small part of it, the device's own, so that none holds them up for
    long, and among prompts each has its share, so that a short one need not wait for a long one. A prompt
    that begins like one being computed waits for that, and then finds it in the cache. cache_tokens: what the
    full-attention layers keep for all requests together, by default what the model was loaded for, and so the
    most that one request may come to. When the cache runs out the youngest request steps back and is computed
    again later; on `cpu` its text does not change. Not thread-safe; see AsyncEngine.
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
        self.max_sequences = max_sequences
        self._cache = model.ops.new_cache(config, full_blocks, sliding_blocks)
        self._full, self._sliding = BlockPool(full_blocks), BlockPool(sliding_blocks)
        self._scheduler = Scheduler(
            self._full,
            self._sliding,
            window=min(config.sliding_window, self.context),
            max_sequences=max_sequences,
            step_tokens=max(step_tokens, max_sequences),
            shared_tokens=model.ops.shared_step_tokens,
        )
        self._ids = count()
        self._current: _Batch | None = None  # begun, its tokens not yet accepted
        self._ahead: _Batch | None = None  # begun after that one, while its tokens were still unknown

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def statistics(self) -> Statistics:
        """What has been done since the engine was made."""
        return self._scheduler.statistics

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in it, or for room in the cache."""
        return len(self._scheduler.waiting)

    @property
    def free_tokens(self) -> int:
        """Tokens whose keys and values there is room for, forgetting what nobody uses."""
        return self._full.available * BLOCK_TOKENS

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; raises RequestError if the model cannot take its prompt."""
        self.model.check_prompt(request.tokens)
        length = len(request.tokens)
        room = self.context - length
        if room < 1:
            raise RequestError(f"the prompt has {length} tokens: no room for an answer in {self.context}")
        request_id = next(self._ids)
        most = room if request.max_tokens is None else min(request.max_tokens, room)
        self._scheduler.add(request_id, request, length + most)
        return request_id

    def cancel(self, request_id: int) -> None:
        """Drop a request wherever it stands and free its blocks; an id that has finished is ignored."""
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if sequence.id == request_id:
                self._scheduler.remove(sequence)

    def computed(self, request_id: int) -> int:
        """Tokens of a request that the cache holds by now; 0 while it waits and once it has finished."""
        return next((s.pages.length for s in self._scheduler.running if s.id == request_id), 0)

    def step(self) -> list[TokenEvent]:
        """Compute one batch; return an event for each request that came to a new token.

        Where the device can, the batch after it is begun before its tokens are waited for.
        """
        batch, running = self._current, self._scheduler.running
        if batch is None or not any(sequence in running for sequence in batch.drawing):
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
            if sequence in running  # begun ahead, it may have ended since
        ]
        if self._current is not None:
            for sequence in self._current.drawing:
                if sequence in running:
                    self._scheduler.advance(sequence)
        return events

    def _begin(self) -> _Batch | None:
        """Begin the next batch of what is known."""
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return None
        drawing = [sequence for sequence in scheduled if sequence.scheduled == sequence.pending]
        tokens = [s.tokens[s.pages.length : s.pages.length + s.scheduled] for s in scheduled]
        rows = [sequence.scheduled == sequence.pending for sequence in scheduled]
        batch = self._batch(scheduled, tokens, rows)
        finish = self.model.begin(batch, self._cache, list(map(_draw, drawing)))
        self.statistics.steps += 1
        for sequence in scheduled:
            self._scheduler.advance(sequence)
        return _Batch(drawing, finish)

    def _begin_ahead(self, last: _Batch) -> _Batch | None:
        """Begin the batch after `last`, whose tokens only the device knows; None where that cannot be done.

        That is when all that runs is drawing, nothing that waits could join it, and none of it is sure to end
        with this token.
        """
        drawing, scheduler = last.drawing, self._scheduler
        if scheduler.admitting or drawing != scheduler.running:
            return None
        draws: list[Draw] = []
        for sequence in drawing:
            draws.append(_draw(sequence, ahead=1))
            if len(sequence.tokens) + 1 >= sequence.end or not self.model.ops.can_run_ahead(draws[-1]):
                return None
        if not scheduler.reserve_ahead():
            return None
        # Token -1 - r stands for what row r of the last batch drew.
        batch = self._batch(drawing, [[-1 - row] for row in range(len(drawing))], [True] * len(drawing))
        try:
            begun = _Batch(drawing, self.model.begin(batch, self._cache, draws))
        except OutOfMemoryError:  # the last batch's tokens are not to be lost: the next call meets it again
            return None
        self.statistics.steps += 1
        return begun

    def _batch(self, sequences: list[Sequence], tokens: list[list[int]], drawing: list[bool]) -> Batch:
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

    def _accept(self, sequence: Sequence, sampled: Sampled | Exception) -> TokenEvent:
        request = sequence.request
        counts = len(request.tokens), sequence.cached_tokens or 0
        if isinstance(sampled, Exception):
            self._scheduler.remove(sequence)
            return TokenEvent(sequence.id, None, *counts, "error", sampled)
        self.statistics.generated_tokens += 1
        sequence.tokens.append(sampled.token)
        reason: FinishReason | None = None
        if sampled.token in request.stop_token_ids:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.end:
            reason = "length"
        if reason is not None:
            self._scheduler.remove(sequence)
        return TokenEvent(sequence.id, sampled, *counts, reason)


def _draw(sequence: Sequence, ahead: int = 0) -> Draw:
    request = sequence.request
    prompt_length = len(request.tokens)
    return Draw(request.sampling, request.seed, request.choice, sequence.tokens, prompt_length, ahead)


def _table(rows: list[Array]) -> Array:
    """Pad block lists of several sequences to one int32 table (S, blocks)."""
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, blocks in zip(table, rows, strict=True):
        row[: len(blocks)] = blocks
    return table
