"""HTTP by hand: a client that can do what no honest one would."""

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

PATIENCE = 10  # seconds


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error's body."""
        message: str = self.json["error"]["message"]
        return message

    @property
    def events(self) -> list[Any]:
        """The body as server-sent events, each parsed; what ends the stream is its text."""
        parts = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part]
        return [part.decode() if part.startswith((b":", b"[")) else json.loads(part) for part in parts]


def parse(data: bytes) -> Reply:
    """Read a whole answer, to the end of its connection."""
    top, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = rest
    if "transfer-encoding" in headers:
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
    return Reply(int(first.split()[1]), headers, body)


class Raw:
    """One connection, on which anything can be sent and everything is read by hand.

    receive_buffer: bytes that its system takes in unread.
    """

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def post(self, path: str, body: object, **headers: str) -> None:
        """Send a request with a body in JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(head("POST", path, len(data), **headers) + data)

    def get(self, path: str, **headers: str) -> Reply:
        """Ask for a path."""
        self.send(head("GET", path, **headers))
        return self.reply()

    def reply(self) -> Reply:
        """Read one answer to its end."""
        status, headers = self.reply_head()
        if "content-length" in headers:
            return Reply(status, headers, self._exactly(int(headers["content-length"])))
        return Reply(status, headers, b"".join(self.chunks()))

    def reply_head(self) -> tuple[int, dict[str, str]]:
        """Read the status and the headers of an answer."""
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(first.split()[1]), headers

    def chunks(self) -> Iterator[bytes]:
        """Read a chunked body, chunk by chunk."""
        while size := int(self._until(b"\r\n"), 16):
            yield self._exactly(size)
            self._exactly(2)
        self._exactly(2)

    def is_closed(self) -> bool:
        """Wait for the server to send something or hang up; whether it hung up."""
        try:
            return not self.socket.recv(1)
        except ConnectionError:
            return True

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._read:
            self._receive()
        found, _, self._read = self._read.partition(mark)
        return found

    def _exactly(self, count: int) -> bytes:
        while len(self._read) < count:
            self._receive()
        found, self._read = self._read[:count], self._read[count:]
        return found

    def _receive(self) -> None:
        part = self.socket.recv(1 << 16)
        if not part:
            raise EOFError(f"the server hung up after {self._read!r}")
        self._read += part


def head(method: str, path: str, length: int | str | None = None, **headers: str) -> bytes:
    """Write a request's head; underscores in the names of headers stand for hyphens."""
    given = {"host": "localhost", "content_type": "application/json"} | headers
    if length is not None:
        given = {"content_length": str(length)} | given
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")
