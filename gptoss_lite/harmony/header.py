"""What stands between the start of a message and ``<|message|>``, read leniently."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from gptoss_lite.harmony.messages import ROLES, Role
from gptoss_lite.tokenizer import Tokenizer

CONTENT_TYPES = ("json", "code", "text")

# A word ends at white space, where JSON begins, and before a "to=" that is glued to a known word.
_WORD = re.compile(r"[{\[]\S*|(?:assistant|analysis|commentary|final)+(?=to=)|[^\s{\[]+")
_ASSISTANT = re.compile(r"(?:assistant)+:?")
_CHANNEL = re.compile(r"(analysis|commentary|final)(?:analysis|commentary|final|\W)*")


@dataclass(frozen=True, slots=True)
class Header:
    """A header as understood; `rest` is the text behind its last word that means something."""

    role: Role = "assistant"
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    rest: str = ""
    stray: tuple[str, ...] = ()


def read_header(
    tokens: Sequence[int], tokenizer: Tokenizer, *, complete: bool, role: Role | None = "assistant"
) -> Header:
    """Read a header; never raises.

    `complete` tells that ``<|message|>`` followed. If not, the first word that means nothing begins the
    message's text, so words like "code" behind it are not taken for a content type. `role` is the author,
    None to read it from the first word, where any word but the known roles is the name of a tool.
    """
    author: tuple[Role, str | None] = (role or "assistant", None)
    channel = recipient = content_type = None
    stray: list[str] = []
    text, words = _scan(tokens, tokenizer)
    behind = 0  # where the last meaningful word ends
    after_known = has_channel = in_front = False
    wanted = ""
    for word, start, is_marker in words:
        end = start + len(word)
        if is_marker:
            in_front = word == "author"
            has_channel |= word == "<|channel|>"
            wanted = "" if in_front and role else word
            continue
        if word[0] in "{[" and not complete:
            break
        if word.startswith("to="):
            recipient = recipient or word[3:] or None
            wanted = "" if word[3:] else "recipient"
        elif wanted == "recipient":
            recipient, wanted = recipient or word, ""
        elif wanted == "author":
            author, wanted = _author(word), ""
        elif wanted == "<|constrain|>":
            content_type, wanted = f"<|constrain|>{word}", ""
        elif in_front and _ASSISTANT.fullmatch(word):
            pass
        elif (wanted == "<|channel|>" or (has_channel and not channel)) and (known := _CHANNEL.match(word)):
            channel, wanted = channel or known[1], ""
            if not word[known.end() :][:1].islower():  # "analysisWe": the text is glued to the channel
                end = start + known.end()
        elif word in CONTENT_TYPES and (complete or after_known):
            content_type = word
        else:
            stray.append(word)
            after_known = False
            continue
        after_known, behind = True, end
    if channel is None and author[0] == "assistant" and (has_channel or not complete):
        channel = "final"
    rest = text[behind:].lstrip() if behind else text
    return Header(*author, channel, recipient, content_type, rest, tuple(stray))


class _Word(NamedTuple):
    text: str
    start: int
    is_marker: bool = False


def _scan(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[_Word]]:
    """Return the text without special tokens, and its words; no word reaches across a special token.

    Each special token leaves a marker among the words, and at the front stands the marker "author".
    """
    names = {tokenizer.special[name]: name for name in ("<|channel|>", "<|constrain|>")}
    runs: list[tuple[str, list[int]]] = [("author", [])]
    for token in tokens:
        if tokenizer.is_special(token):
            runs.append((names.get(token, ""), []))
        else:
            runs[-1][1].append(token)
    text = ""
    words: list[_Word] = []
    for marker, ids in runs:
        run = tokenizer.decode(ids)
        words.append(_Word(marker, len(text), is_marker=True))
        words += [_Word(match[0], len(text) + match.start()) for match in _WORD.finditer(run)]
        text += run
    return text, words


def _author(word: str) -> tuple[Role, str | None]:
    """Read ``role``, ``role:name`` or the name of a tool."""
    head, _, name = word.partition(":")
    if _ASSISTANT.fullmatch(head):
        head = "assistant"
    if head in ROLES and head != "tool":
        return cast(Role, head), name or None
    return "tool", word
