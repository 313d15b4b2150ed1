"""What an operator decides about a server."""

import re
from dataclasses import dataclass

from gptoss_lite.errors import RequestError

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # this machine, for itself alone
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")  # as browsers send one


@dataclass(frozen=True, slots=True)
class Settings:
    """How to serve a model.

    model: the name that clients ask for. api_keys: who may ask; none lets everybody. max_waiting: requests
    that may wait for a place in the batch, more are refused with 429. max_body: bytes of a request;
    head_seconds, body_seconds: how long its parts may take to arrive. max_seconds: how long an answer may
    take, after which it ends as if at its `max_tokens`; None for no limit. write_seconds: how long a client
    may let what it was sent stand before it counts as gone. idle_seconds: how long a connection may rest
    between two requests. keep_alive_seconds: silence after which a stream has got a comment.
    cors_origins: pages of other origins that may call. allowed_hosts: names under which the server may be
    called, all if empty; it keeps pages from reaching a server on the reader's own machine through a name of
    theirs. reasoning_content: repeat `reasoning` under that older name. date: the current date that the model
    is told, today's by default.

    Raises RequestError for a key that cannot be sent, and for an origin that no browser would send.
    """

    model: str
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 256
    max_body: int = 8 << 20
    head_seconds: float = 20
    body_seconds: float = 30
    max_seconds: float | None = None
    write_seconds: float = 60
    idle_seconds: int = 60
    keep_alive_seconds: float = 15
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    reasoning_content: bool = False
    date: str | None = None

    def __post_init__(self) -> None:
        """Check what would never match."""
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError("an API key may have printable ASCII characters only, and no spaces")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise RequestError(
                    f"{origin!r} is no origin: give scheme://host[:port] in small letters, or *"
                )
