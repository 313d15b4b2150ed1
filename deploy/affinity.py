"""What the requests of one conversation have in common; knows nothing of Ray."""

from hashlib import blake2b
from typing import Any

import msgspec

# Of the last text that counts. A conversation's beginning stays as it is, but a plain completion's prompt
# may grow: while it is shorter it counts as another each time, and little is lost.
CHARACTERS = 1024


def conversation(key: bytes, body: bytes) -> str:
    """Name the conversation that a request goes on with: the same for all its turns, for one API key alone.

    What counts are the messages up to the first of a user, and of that one, as of a plain prompt, the first
    1,024 characters: requests that agree in them begin with the same tokens, which a cache may hold.
    key: the header that carries the API key. Returns "" for a body that has no beginning.
    """
    try:
        beginning = _beginning(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""  # a replica will say what is wrong
    if not beginning:
        return ""
    return blake2b(msgspec.json.encode(beginning), key=blake2b(key).digest(), digest_size=16).hexdigest()


def _beginning(request: Any) -> list[Any]:
    match request:
        case {"messages": list(messages)}:
            return _until_user(messages)
        case {"input": list(items)}:
            return [request.get("instructions"), *_until_user(items)]
        case {"input": str(text)}:
            return [request.get("instructions"), text[:CHARACTERS]]
        case {"prompt": str() | list() as prompt}:
            return [prompt[:CHARACTERS]]
    return []


def _until_user(messages: list[Any]) -> list[Any]:
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return [*messages[:index], _start(message.get("content"))]
    return messages


def _start(content: Any) -> Any:
    """Cut a text, or the text of the first part of many."""
    match content:
        case str():
            return content[:CHARACTERS]
        case [{"text": str(text)}, *_]:
            return text[:CHARACTERS]
    return content
