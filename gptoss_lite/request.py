"""What an engine is asked for, and what it answers, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptoss_lite.errors import RequestError
from gptoss_lite.sampling import Sampled, SamplingParams

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
