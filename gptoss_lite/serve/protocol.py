"""HTTP on one connection: uvicorn's protocol, firm against clients that dawdle, flood or stop reading."""

import asyncio
import socket
import struct
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gptoss_lite.serve.errors import error_body
from gptoss_lite.serve.settings import Settings
from gptoss_lite.serve.wire import encode

_LONGEST_HEAD = 64 << 10  # bytes
_AT_ONCE = struct.pack("ii", 1, 0)
_CHUNK_OVERHEAD = 8  # bytes of framing that one byte of a body may cost: chunks of one byte have five


class Config(uvicorn.Config):
    """uvicorn's configuration, and the time limits of the server that it is for."""

    settings: Settings


class Protocol(HttpToolsProtocol):
    """Drops a connection where a request does not come to its end, or an answer is not read, in time.

    An open socket costs a client nothing, and many add up. Answers one request after another: what is sent
    before the answer to the last is there is not read, as RFC 9112 allows (9.3.2), so that a client's going
    is noticed at any time. Offers to go on in another protocol are declined.
    """

    config: Config

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}  # by what is waited for
        self._unread = False  # whether more was sent than is answered
        self._surplus = 0  # bytes of this request that are no body
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Read on; what follows an answer has to become a request in time, too."""
        if self._unread:
            return
        self._unset_keepalive_if_required()
        self._surplus += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "this is not HTTP/1.1 as the server reads it")
        if self._surplus > _LONGEST_HEAD:
            self._refuse(431, f"a request's head has more than {_LONGEST_HEAD} bytes")
        if not self._answering:
            self._await_request()

    def on_headers_complete(self) -> None:
        """Answer a request, unless another is being answered."""
        if self._answering:
            self.cycle.keep_alive = False
            self._unread = True
        elif not self._is_offer:
            self._stop_waiting("request")
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand on a part of the body."""
        self._surplus = max(0, self._surplus - (1 + _CHUNK_OVERHEAD) * len(body))
        if not self._unread:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is there to its end."""
        self._surplus = 0
        if not self._unread and not self._is_offer:
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes: begin to wait for it."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It caught up."""
        super().resume_writing()
        self._stop_waiting("reader")

    def on_response_complete(self) -> None:
        """An answer has been written, though perhaps not yet sent."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for long; what the client has not read by now it will not read."""
        self._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        for what in list(self._timers):
            self._stop_waiting(what)
        super().connection_lost(exc)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_offer(self) -> bool:
        """Whether this request offers another protocol; its body has then not been read."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _decline(self, rest: bytes) -> None:
        """Read a request again as if it had offered nothing, as RFC 9110 allows (7.8): Java's client does."""
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self, status: int, message: str) -> None:
        """Say what is wrong, if the line is free, and hang up."""
        if self.transport.is_closing():
            return
        if self._answering:
            return self._drop()
        body = encode(error_body(message, status))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _await_request(self) -> None:
        self._wait("request", self.config.settings.head_seconds)

    def _await_reader(self) -> None:
        self._wait("reader", self.config.settings.write_seconds)

    def _wait(self, what: str, seconds: float) -> None:
        """Let the connection end so many seconds after something is first waited for."""
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self._drop)

    def _stop_waiting(self, what: str) -> None:
        if what in self._timers:
            self._timers.pop(what).cancel()

    def _drop(self) -> None:
        if self.transport.get_write_buffer_size():  # the system is not to go on sending what nobody reads
            link = self.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.transport.abort()
