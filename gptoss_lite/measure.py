"""Prefill and decode, timed through the engine, as answers are made.

Prompts are random token ids, no two alike, so that nothing of one is in the cache before; tokens are drawn at
temperature 1.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from gptoss_lite.cache import BLOCK_TOKENS
from gptoss_lite.config import ModelConfig
from gptoss_lite.engine import Engine, Request
from gptoss_lite.errors import RequestError
from gptoss_lite.model import GptOss
from gptoss_lite.ops.base import Array
from gptoss_lite.sampling import SamplingParams
from gptoss_lite.synthetic import random_bytes

WARM_UP_TOKENS = 32  # of the prompt that kernels are compiled for
WARM_UP_STEPS = 4  # of decode before any is measured: a GPU records the first
PATIENCE = 60.0  # seconds that filling the cache by prefill may take; else random numbers take its place
_SPARE = 32  # tokens that a sequence may be ahead of the last one when all are under way
_MOST_SEQUENCES = 256


@dataclass(frozen=True, slots=True)
class Workload:
    """What is run: a prompt, then a number of tokens after `context` tokens, by some sequences at once.

    context: None means as many as the prompt has. Raises RequestError for what cannot be run.
    """

    prompt_tokens: int = 512
    tokens: int = 64
    context: int | None = None
    concurrency: int = 1
    repeat: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        for name in ("prompt_tokens", "tokens", "context", "concurrency", "repeat"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise RequestError(f"{name} is {value!r}: give an integer of at least 1")
        if self.concurrency > _MOST_SEQUENCES:
            raise RequestError(f"concurrency is {self.concurrency}: give 1 to {_MOST_SEQUENCES}")

    @property
    def start(self) -> int:
        """Tokens of context at which decode begins."""
        return self.prompt_tokens if self.context is None else self.context

    @property
    def longest(self) -> int:
        """The most tokens that a sequence comes to."""
        return max(self.start + WARM_UP_STEPS + self.tokens + _SPARE, self.prompt_tokens + 1)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache must have room for, by whole blocks a sequence."""
        return self.concurrency * -(-self.longest // BLOCK_TOKENS) * BLOCK_TOKENS

    def check(self, config: ModelConfig) -> None:
        """Raise RequestError where it is beyond a model's context."""
        most = config.max_position_embeddings
        if self.longest > most:
            raise RequestError(
                f"{self.longest} tokens are beyond the model's context of {most}: "
                f"{self.start} of context, {self.tokens} more, and {WARM_UP_STEPS + _SPARE} to spare"
            )


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt, timed from its submission to its first token."""

    tokens: int
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Decode:
    """Steps of which each gives every sequence a token.

    context: tokens of each sequence before the first of all; filled: how the cache came by them. A rate
    counts the tokens of all sequences, over the median step.
    """

    sequences: int
    context: int
    filled: Literal["by prefill", "at random"]
    step_seconds: tuple[float, ...]
    median_step_seconds: float
    tokens_per_s: float

    @property
    def visible(self) -> float:
        """Tokens that a query sees in a full layer, itself included, on average over the steps."""
        return self.context + WARM_UP_STEPS + (len(self.step_seconds) + 1) / 2


class MeasuredEngine(Engine):
    """An engine with room for a workload, whose cache may be said to hold a prompt."""

    def __init__(self, model: GptOss, workload: Workload) -> None:
        super().__init__(model, max_sequences=workload.concurrency, cache_tokens=workload.cache_tokens)
        self._is_filled = False

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a key's or value's number."""
        return int(self._cache.keys[0].itemsize) if self._cache.keys else 0

    @property
    def can_assume(self) -> bool:
        """Whether `assume` can write to the cache: where it is in main memory."""
        return all(isinstance(array, np.ndarray) for array in self._cache.keys)

    def assume(self, tokens: Sequence[int]) -> None:
        """Take a prompt as computed, but for its last block; its keys and values are random numbers."""
        if not self._is_filled:
            for array in (*self._cache.keys, *self._cache.values):
                _fill(array)
            self._is_filled = True
        pages = self._scheduler.new_pages()
        for _ in range(len(tokens) // BLOCK_TOKENS):
            reserved = pages.reserve(BLOCK_TOKENS)
            assert reserved, "the cache has room for the workload"
            pages.advance(tokens, BLOCK_TOKENS)
        pages.release()


def _fill(array: Array) -> None:
    """Write numbers of either sign from 1/2 to 1, bf16 or float32, or some like them in fp16."""
    bits = 8 * array.itemsize
    mantissa = bits - 9
    keep, add = (1 << (bits - 1)) | ((1 << mantissa) - 1), 126 << mantissa
    array.reshape(-1).view(np.uint8)[:] = random_bytes(array.nbytes, keep, add, bits)


def measure_prefill(engine: Engine, prompt: Sequence[int], seed: int = 0) -> Prefill:
    """Time a prompt that the cache knows nothing of."""
    start = time.perf_counter()
    engine.submit(Request(prompt, SamplingParams(), seed, 1))
    _drain(engine)
    seconds = time.perf_counter() - start
    return Prefill(len(prompt), seconds, len(prompt) / seconds)


def measure_decode(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, *, is_random: bool = False, seed: int = 0
) -> Decode:
    """Time so many steps that go on from prompts of one length, each of which is in the cache already."""
    most = WARM_UP_STEPS + tokens + _SPARE
    ids = [
        engine.submit(Request(prompt, SamplingParams(), seed + i, most)) for i, prompt in enumerate(prompts)
    ]
    waiting = set(ids)
    while waiting:
        waiting -= set(_step(engine))
    for _ in range(WARM_UP_STEPS):
        _step(engine)
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        found = _step(engine)
        seconds.append(time.perf_counter() - start)
        assert len(found) == len(ids)
    for request_id in ids:
        engine.cancel(request_id)
    step = median(seconds)
    filled: Literal["by prefill", "at random"] = "at random" if is_random else "by prefill"
    return Decode(len(ids), len(prompts[0]), filled, tuple(seconds), step, len(ids) / step)


def _drain(engine: Engine) -> None:
    while engine.has_work:
        _step(engine)


def _step(engine: Engine) -> list[int]:
    """Compute one batch -> the requests that came to a token; raises what one of them failed with."""
    events = engine.step()
    for event in events:
        if event.error is not None:
            raise event.error
    return [event.request_id for event in events]


@dataclass(frozen=True, slots=True)
class Repetition:
    """One prompt and one stretch of decode."""

    prefill: Prefill
    decode: Decode


def warm_up(engine: MeasuredEngine, workload: Workload) -> float:
    """Do a little of all that will be measured, which compiles kernels -> the seconds that took."""
    start = time.perf_counter()
    length = min(WARM_UP_TOKENS, workload.prompt_tokens, workload.start)
    new_prompt = _prompts(engine.model.config, workload.seed, 0)
    prompts = [new_prompt(length) for _ in range(workload.concurrency)]
    for prompt in prompts:
        measure_prefill(engine, prompt)
    measure_decode(engine, prompts, 1)
    return time.perf_counter() - start


def repetition(engine: MeasuredEngine, workload: Workload, number: int) -> Repetition:
    """Measure a workload once; number: from 1, of a repetition whose prompts are its own."""
    new_prompt = _prompts(engine.model.config, workload.seed, number)
    prompt = new_prompt(workload.prompt_tokens)
    prefill = measure_prefill(engine, prompt, workload.seed)
    known = [prompt] if workload.start == workload.prompt_tokens else []
    others = [new_prompt(workload.start) for _ in range(workload.concurrency - len(known))]
    seconds = sum(map(len, others)) / prefill.tokens_per_s
    is_random = seconds > PATIENCE and engine.can_assume
    for other in others:
        if is_random:
            engine.assume(other)
        else:
            measure_prefill(engine, other)
    decode = measure_decode(engine, known + others, workload.tokens, is_random=is_random, seed=workload.seed)
    return Repetition(prefill, decode)


def _prompts(config: ModelConfig, seed: int, number: int) -> Callable[[int], list[int]]:
    """Return what makes a prompt of so many tokens that begins like no other."""
    rng = np.random.default_rng((seed, number))
    return lambda tokens: rng.integers(0, config.vocab_size, tokens).tolist()
