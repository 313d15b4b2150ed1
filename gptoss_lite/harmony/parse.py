"""Sampled tokens to messages, token by token; whatever a model writes, nothing here raises."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TypeAlias

from gptoss_lite.harmony.header import Header, read_header
from gptoss_lite.harmony.messages import Message, Role
from gptoss_lite.harmony.render import opening
from gptoss_lite.tokenizer import Tokenizer

TURN_ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")
MESSAGE_ENDS = ("<|end|>", *TURN_ENDS)


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end an assistant's turn."""
    return frozenset(tokenizer.special[name] for name in TURN_ENDS)


@dataclass(frozen=True, slots=True)
class MessageStart:
    """A message's header is complete.

    A recipient makes it a tool call, on whatever channel. Without one, analysis is reasoning and every
    other channel, None included, is for the user.
    """

    channel: str | None
    recipient: str | None
    content_type: str | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the message that has started: whole characters, never empty."""

    text: str
    channel: str | None
    recipient: str | None


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """A message is finished, or was cut off."""

    message: Message


Event: TypeAlias = MessageStart | TextDelta | MessageEnd


def parse_messages(
    tokens: Iterable[int], tokenizer: Tokenizer, *, role: Role | None = None
) -> tuple[Message, ...]:
    """Parse a whole conversation; with `role`, the tokens begin inside the header of a message of that role.

    Never raises on any ids. The author of a message that is no known role is a tool of that name.
    """
    parser = _MessageParser(tokenizer, chain([role], repeat(None)), in_header=role is not None)
    for token in tokens:
        parser._process(token)
    parser._close()
    return tuple(parser.messages)


def turn_messages(tokens: Iterable[int], tokenizer: Tokenizer) -> tuple[Message, ...]:
    """Turn the sampled tokens of one assistant turn into messages that render as the tokens they came from.

    Only ``<|return|>`` becomes ``<|end|>``, and what was in no message is left out, so a prompt made of
    earlier messages and these extends the sampled one and its cached prefix stays valid.
    """
    parser = TurnParser(tokenizer)
    for token in tokens:
        parser.feed(token)
    parser.finish()
    return tuple(parser.messages)


class _MessageParser:
    """The states of one message after another: between messages, in a header, in content.

    `authors` gives the role of each message in turn, None where its header tells.
    """

    def __init__(self, tokenizer: Tokenizer, authors: Iterator[Role | None], *, in_header: bool):
        self.messages: list[Message] = []
        self.repairs: list[str] = []
        self._tokenizer = tokenizer
        self._authors = authors
        names = ("<|start|>", "<|message|>", "<|channel|>", *MESSAGE_ENDS)
        self._names = {tokenizer.special[name]: name for name in names}
        self._in_header = in_header
        self._header: Header | None = None  # while in content
        self._pending: list[int] = []  # of the header, or what stands between messages
        self._sampled: list[int] = []  # all ids since the last <|start|>
        self._text: list[str] = []
        self._decoder = tokenizer.decoder()

    def _process(self, token: int) -> list[Event]:
        """Take one token."""
        name = self._names.get(token, "")
        if name == "<|start|>":
            events = self._close(token)
            self._in_header = True
            self._sampled = [token]
            return events
        if name in MESSAGE_ENDS:
            return self._close(token)
        self._sampled.append(token)
        if self._header is None:
            return list(self._process_header(token, name))
        return list(self._process_content(token))

    def _close(self, end: int | None = None) -> list[Event]:
        """End the message or header there is, by a terminator or none; afterwards no message is open."""
        events: list[Event] = []
        if self._header is None and self._in_header and self._pending:
            header = self._read_header(complete=False)
            if header.rest.strip():
                self._repair("<|message|> was missing: took what follows the header for the text")
                events = [*self._open(header), *self._add(header.rest)]
            else:
                self._repair("dropped a header without a message")
        elif self._header is None and self._pending:
            self._repair("dropped text between messages")
        if self._header is not None:
            events += [*self._add(self._decoder.finish()), self._finish(self._header, end)]
        self._pending = []
        self._in_header = False
        self._sampled = []
        return events

    def _repair(self, note: str) -> None:
        """Note what was put right, once if it is the same again and again."""
        if note not in self.repairs[-1:]:
            self.repairs.append(note)

    def _process_header(self, token: int, name: str) -> Iterator[Event]:
        if not self._in_header and name:  # <|channel|> or <|message|>
            self._repair("<|start|> was missing")
            self._in_header = True
        if name != "<|message|>":
            self._pending.append(token)
            return
        header = self._read_header(complete=True)
        if header.stray:
            self._repair(f"ignored {' '.join(header.stray)!r} in a header")
        self._pending = []
        yield from self._open(header)

    def _process_content(self, token: int) -> Iterator[Event]:
        if self._tokenizer.is_special(token):
            self._repair("dropped a special token inside a message")
            return
        if not 0 <= token < self._tokenizer.vocab_size:
            self._repair("replaced an id outside the vocabulary")
        yield from self._add(self._decoder.feed(token))

    def _read_header(self, *, complete: bool) -> Header:
        return read_header(self._pending, self._tokenizer, complete=complete, role=next(self._authors))

    def _open(self, header: Header) -> Iterator[Event]:
        self._header, self._text = header, []
        yield MessageStart(header.channel, header.recipient, header.content_type)

    def _add(self, text: str) -> Iterator[Event]:
        assert self._header is not None
        if text:
            self._text.append(text)
            yield TextDelta(text, self._header.channel, self._header.recipient)

    def _finish(self, header: Header, end: int | None) -> MessageEnd:
        message = Message(
            header.role,
            ("".join(self._text),),
            name=header.name,
            channel=header.channel,
            recipient=header.recipient,
            content_type=header.content_type,
            tokens=self._replayable(header, end),
        )
        self.messages.append(message)
        self._header = None
        return MessageEnd(message)

    def _replayable(self, header: Header, end: int | None) -> tuple[int, ...] | None:
        return None


class TurnParser(_MessageParser):
    """Streaming parser of one assistant turn.

    Feed it each sampled token; the turn ends at ``<|return|>``, ``<|call|>`` or ``<|endoftext|>`` and what
    follows is ignored. `messages` are those finished so far, with the ids they came from, so that they can
    be replayed; `repairs` says in words what was wrong with the model's output. Never raises.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer, repeat("assistant"), in_header=True)
        self._sampled = opening("assistant", tokenizer)
        self.end_token: int | None = None
        self._turn_ends = turn_ends(tokenizer)

    @property
    def finished(self) -> bool:
        """Whether the model has ended its turn."""
        return self.end_token is not None

    @property
    def in_message(self) -> bool:
        """Whether a message is being written, its header complete."""
        return self._header is not None

    @property
    def channel(self) -> str | None:
        """Channel of the message being written, None in a header."""
        return self._header.channel if self._header else None

    @property
    def recipient(self) -> str | None:
        """Recipient of the message being written, None in a header."""
        return self._header.recipient if self._header else None

    def feed(self, token: int) -> list[Event]:
        """Take one sampled id and return what it completes, often nothing."""
        if self.finished:
            self._repair("dropped tokens after the end of the turn")
            return []
        if token in self._turn_ends:
            self.end_token = token
        return self._process(token)

    def finish(self) -> list[Event]:
        """Close the message that a length limit cut off; `finished` stays as it is."""
        return self._close()

    def _replayable(self, header: Header, end: int | None) -> tuple[int, ...] | None:
        special = self._tokenizer.special
        if self._sampled[:1] != [special["<|start|>"]]:
            return None  # rendered afresh: without <|start|> it could not follow any message
        if end == special["<|start|>"]:
            return tuple(self._sampled)
        is_call = end == special["<|call|>"] or (end is None and header.recipient is not None)
        return (*self._sampled, special["<|call|>" if is_call else "<|end|>"])
