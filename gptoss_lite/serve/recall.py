"""What the model wrote in earlier turns, token by token, so that a conversation goes on from the very same.

Clients send a turn back as text; rendered afresh it often becomes other tokens (the order of a call's header,
another split of a word), and what the cache holds of it would be lost. This changes nothing of what is said.
"""

import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from gptoss_lite.harmony import Message, from_chat
from gptoss_lite.harmony.chat import call_name
from gptoss_lite.stream import ANALYSIS, is_call

MOST_TURNS = 4096
MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Turn:
    messages: tuple[Message, ...]  # without their tokens, which lie end to end beside them
    tokens: "array[int]"
    lengths: tuple[int | None, ...]


def assistant_message(messages: Sequence[Message], call_ids: Mapping[int, str]) -> dict[str, Any]:
    """Put a turn's messages into the one message that OpenAI's API has for them.

    call_ids: of the messages that are tool calls, by their index in the turn. What holds nothing is left out,
    and `content` is None where there is none beside calls.
    """
    contents = [m.text for m in messages if not is_call(m.recipient) and m.channel != ANALYSIS]
    calls = [(call_ids[i], m) for i, m in enumerate(messages) if is_call(m.recipient)]
    reasoning = "".join(m.text for m in messages if not is_call(m.recipient) and m.channel == ANALYSIS)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(contents)}
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": call_name(call.recipient), "arguments": call.text},
            }
            for call_id, call in calls
        ]
    if reasoning:
        message["reasoning"] = reasoning
    return message


class Recall:
    """The last turns of all conversations, each found by what a client makes of it.

    Clients are told apart by their salt. Bounded: 4,096 turns, a million tokens.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # long requests are read in threads
        self._turns: OrderedDict[bytes, _Turn] = OrderedDict()
        self._tokens = 0

    def remember(self, messages: tuple[Message, ...], salt: bytes) -> None:
        """Keep a finished turn, both as it is and for clients that do not send reasoning back."""
        spoken = tuple(m for m in messages if m.channel != ANALYSIS or is_call(m.recipient))
        for kept in {messages, spoken}:
            self._keep(_key(_replayed(kept), salt), kept)

    def find(self, replayed: tuple[Message, ...], salt: bytes) -> tuple[Message, ...]:
        """Return the turn that the model wrote, for one read from a client's message; else that one."""
        with self._lock:
            turn = self._turns.get(key := _key(replayed, salt))
            if turn is None:
                return replayed
            self._turns.move_to_end(key)
        start, found = 0, []
        for message, length in zip(turn.messages, turn.lengths, strict=True):
            tokens = None if length is None else tuple(turn.tokens[start : start + length])
            start += length or 0
            found.append(replace(message, tokens=tokens))
        return tuple(found)

    def _keep(self, key: bytes, messages: Sequence[Message]) -> None:
        tokens = array("i", [token for m in messages for token in m.tokens or ()])
        lengths = tuple(None if m.tokens is None else len(m.tokens) for m in messages)
        bare = tuple(_bare(m) for m in messages)
        with self._lock:
            self._forget(key)
            self._turns[key] = _Turn(bare, tokens, lengths)
            self._tokens += len(tokens)
            while self._tokens > MOST_TOKENS or len(self._turns) > MOST_TURNS:
                self._forget(next(iter(self._turns)))

    def _forget(self, key: bytes) -> None:
        if key in self._turns:
            self._tokens -= len(self._turns.pop(key).tokens)


def _bare(message: Message) -> Message:
    """Leave off what the tokens say. A call made while thinking stays when the thought is dropped."""
    channel = "commentary" if is_call(message.recipient) else message.channel
    content = () if message.tokens else message.content
    return replace(message, channel=channel, content=content, tokens=None)


def _replayed(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Read a turn as it will be read when it comes back."""
    ids = {i: str(i) for i, m in enumerate(messages) if is_call(m.recipient)}
    return from_chat([assistant_message(messages, ids)])[1:]


def _key(messages: Sequence[Message], salt: bytes) -> bytes:
    said = repr([(m.channel, m.recipient, m.text) for m in messages])
    return blake2b(said.encode(errors="surrogatepass"), key=blake2b(salt).digest(), digest_size=16).digest()
