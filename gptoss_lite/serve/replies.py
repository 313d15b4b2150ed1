"""What chat and plain completions give, as OpenAI's API spells it."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from gptoss_lite.serve.wire import Reply
from gptoss_lite.stream import Usage


class PromptTokensDetails(Reply, omit_defaults=False):
    """How much of the prompt was found in the cache."""

    cached_tokens: int


class CompletionTokensDetails(Reply, omit_defaults=False):
    """How much of the answer was reasoning."""

    reasoning_tokens: int


class UsageReply(Reply, omit_defaults=False):
    """The tokens that a request came to."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage_reply(usage: Usage) -> UsageReply:
    """Put a usage into the form of chat and plain completions."""
    return UsageReply(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=usage.reasoning_tokens),
    )


class TopLogprob(Reply, omit_defaults=False):
    """A token that might have been, and its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Reply, omit_defaults=False):
    """Log-probabilities of the tokens of the content."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionDelta(Reply):
    """More of a call: its name at first, then its arguments bit by bit."""

    arguments: str
    name: str | None = None


class ToolCallDelta(Reply):
    """More of the call with this index."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class Delta(Reply):
    """What has come of a message since the last chunk."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Reply, omit_defaults=False):
    """What has come of one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class Chunk(Reply, omit_defaults=False):
    """A part of a stream; the last has the usage alone, where it was asked for."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: UsageReply | UnsetType | None = UNSET


class Choice(Reply, omit_defaults=False):
    """One answer."""

    index: int
    message: dict[str, Any]
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class ChatCompletion(Reply, omit_defaults=False):
    """The whole answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: UsageReply
    object: Literal["chat.completion"] = "chat.completion"
