"""Fields that several kinds of request share, and what they come to for the engine."""

import secrets
from typing import Annotated, Literal

from msgspec import Meta

from gptoss_lite.errors import RequestError
from gptoss_lite.sampling import LogitsProcessor, SamplingParams
from gptoss_lite.serve.wire import Record

MOST_LOGPROBS = 20
MOST_STOPS = 16
_SEED_VALUES = 2**64

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=1000)]


class StreamOptions(Record):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Choosing(Record):
    """How tokens are chosen and where an answer ends: the same for every kind of answer.

    `user`, and other names that only let a provider tell its customers apart, are taken and not used.
    """

    model: str
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MOST_STOPS)] | None = None
    stop_on_repetition: bool | None = None
    stream: bool | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings, none, one or several."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def drawn_seed(self) -> int:
        """The request's seed as the engine has it, or a new one."""
        return secrets.randbits(64) if self.seed is None else self.seed % _SEED_VALUES

    def sampling(self, logprobs: int | None, processors: tuple[LogitsProcessor, ...] = ()) -> SamplingParams:
        """Return the engine's own parameters; RequestError names a value that it does not take."""
        given = {
            name: value
            for name in (
                "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty",
            )
            if (value := getattr(self, name)) is not None
        }  # fmt: skip
        return SamplingParams(
            **given, logit_bias=self._biases(), logprobs=logprobs, logits_processors=processors
        )

    def _biases(self) -> dict[int, float]:
        biases = {}
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal()):
                raise RequestError(f"logit_bias has the key {token[:20]!r}: give token ids")
            biases[int(token[:20])] = bias
        return biases


class CompletionFields(Choosing):
    """What chat and plain completion have besides: how many answers, and how they come."""

    max_tokens: TokenCount | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        """Raise RequestError where there are options for a stream and no stream."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for a stream: set stream to true")
