"""One request's sampled tokens to events: text by channel, stop strings, usage; knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from gptoss_lite.engine import TokenEvent
from gptoss_lite.errors import RequestError
from gptoss_lite.harmony import Message, MessageEnd, MessageStart, TextDelta, TurnParser
from gptoss_lite.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]
ANALYSIS = "analysis"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a finished request, and the seed that repeats it.

    cached_tokens: how many of prompt_tokens were found in the cache; reasoning_tokens: how many of
    completion_tokens were written on the analysis channel, tool calls apart.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """One sampled token and the text that it completed, often none.

    channel: "analysis", "commentary" or "final"; None inside a header and in plain completion. recipient: the
    function that the text is an argument for. message: which of the turn's messages this is, counted from 0;
    None where channel is. logprob and top_logprobs: as SamplingParams.logprobs asks. The last event has a
    finish_reason, the usage, and in a chat the turn's messages, which can go back into the next call.
    """

    channel: str | None
    text: str
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    recipient: str | None = None
    message: int | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    messages: tuple[Message, ...] = ()

    @property
    def is_content(self) -> bool:
        """Whether the text is for the user: neither reasoning nor a tool call."""
        return self.channel != ANALYSIS and not self.is_call

    @property
    def is_call(self) -> bool:
        """Whether the text is an argument for a tool."""
        return is_call(self.recipient)


class StopStrings:
    """Finds the first stop string in text that comes in pieces, holding back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError(f"stop is {stops!r}: give a list of strings, none of them empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take a piece and return what can be shown; nothing from a stop string on."""
        if self.found:
            return ""
        if not self._stops:
            return text
        self._held += text
        starts = {stop: self._held.find(stop) for stop in self._stops}
        hits = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
        if hits:  # the one that is complete first, however the text is cut
            self.found = True
            return self._held[: min(hits)[1]]
        longest = max((self._overlap(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - longest]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """Return what was held back in vain."""
        held, self._held = ("" if self.found else self._held), ""
        return held

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


@dataclass(slots=True)
class Piece:
    """What one token came to, before it is put into an event."""

    text: str = ""
    channel: str | None = None
    recipient: str | None = None
    message: int | None = None


class Reader(Protocol):
    """Makes text of one request's tokens."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""

    def feed(self, token: int) -> Piece:
        """Take a sampled token."""

    def finish(self) -> Piece:
        """Give what is still held back when there are no more tokens."""

    def messages(self) -> tuple[Message, ...]:
        """The messages the tokens made, if they were a chat turn."""


class CompletionReader:
    """Plain completion: every token is text, special tokens excepted."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder()
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.found

    def feed(self, token: int) -> Piece:
        """Take a sampled token."""
        return Piece("" if self._tokenizer.is_special(token) else self._stops.feed(self._decoder.feed(token)))

    def finish(self) -> Piece:
        """Give what is still held back."""
        return Piece(self._stops.feed(self._decoder.finish()) + self._stops.finish())

    def messages(self) -> tuple[Message, ...]:
        """Nothing: a completion is no chat turn."""
        return ()


class TurnReader:
    """An assistant's turn in harmony; stop strings are looked for in each message meant for the user."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._parser = TurnParser(tokenizer)
        self._stop_list = stops
        self._stops = StopStrings(stops)
        self._shown = ""
        self._begun = 0  # messages

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.found

    def feed(self, token: int) -> Piece:
        """Take a sampled token."""
        return self._read(self._parser.feed(token))

    def finish(self) -> Piece:
        """Give what is still held back."""
        return self._read(self._parser.finish())

    def messages(self) -> tuple[Message, ...]:
        """The turn's messages, with their sampled ids; one that a stop string cut ends before it."""
        messages = tuple(self._parser.messages)
        if self.stopped:
            messages = (*messages[:-1], replace(messages[-1], content=(self._shown,), tokens=None))
        return messages

    def _read(self, events: Sequence[MessageStart | TextDelta | MessageEnd]) -> Piece:
        """Put together what one token came to: it is all of one message."""
        piece = Piece(channel=self._parser.channel, recipient=self._parser.recipient)
        for event in events:
            match event:
                case MessageStart():
                    self._stops, self._shown = StopStrings(self._stop_list), ""
                    self._begun += 1
                case TextDelta(text, channel, recipient):
                    piece.channel, piece.recipient = channel, recipient
                    piece.text += text if _is_private(piece) else self._stops.feed(text)
                case MessageEnd(message):
                    piece.channel, piece.recipient = message.channel, message.recipient
                    piece.text += "" if _is_private(piece) else self._stops.finish()
        if events or self._parser.in_message:
            piece.message = self._begun - 1
        self._shown += piece.text
        return piece


def _is_private(piece: Piece) -> bool:
    return piece.channel == ANALYSIS or is_call(piece.recipient)


def is_call(recipient: str | None) -> bool:
    """Whether a message to this recipient is a tool call."""
    return recipient not in (None, "all")  # "all" is what harmony calls everybody, the user included


@dataclass(slots=True)
class EventStream:
    """Turns one request's token events into generation events."""

    reader: Reader
    seed: int
    prompt_tokens: int
    hidden: frozenset[int]  # the caller's own stop tokens, whose text is not part of the answer
    _cached_tokens: int = field(default=0, init=False)
    _completion_tokens: int = field(default=0, init=False)
    _reasoning_tokens: int = field(default=0, init=False)

    def accept(self, event: TokenEvent) -> GenerationEvent:
        """Take the next token event; raises what made the request fail.

        After an event with a finish_reason there is no more to come, and the engine may still have to be
        told.
        """
        if event.error is not None:
            raise event.error
        assert event.sampled is not None and event.finish_reason != "error"
        token = event.sampled.token
        hidden = token in self.hidden
        piece = Piece() if hidden else self.reader.feed(token)
        self._cached_tokens = event.cached_tokens
        self._completion_tokens += 1
        self._reasoning_tokens += piece.channel == ANALYSIS and not is_call(piece.recipient)
        reason: FinishReason | None = event.finish_reason
        given = GenerationEvent(
            piece.channel, piece.text, token, event.sampled.logprob, event.sampled.top_logprobs,
            piece.recipient, piece.message,
        )  # fmt: skip
        if reason is None and not self.reader.stopped:
            return given
        ended = self.cut()
        if self.reader.stopped:
            reason = "stop"
        elif reason == "stop" and not hidden:
            reason = "tool_calls" if any(is_call(m.recipient) for m in ended.messages) else "stop"
        last = ended if ended.text else given
        return replace(
            given, channel=last.channel, text=given.text + ended.text, recipient=last.recipient,
            message=last.message, finish_reason=reason, usage=ended.usage, messages=ended.messages,
        )  # fmt: skip

    def cut(self) -> GenerationEvent:
        """End the answer where it stands, for want of tokens: what was held back comes, and the usage.

        Its token is -1: there is none.
        """
        piece = self.reader.finish()
        counts = self._completion_tokens, self._reasoning_tokens
        return GenerationEvent(
            piece.channel, piece.text, -1, recipient=piece.recipient, message=piece.message,
            finish_reason="length",
            usage=Usage(self.prompt_tokens, self._cached_tokens, *counts, self.seed),
            messages=self.reader.messages(),
        )  # fmt: skip
