"""A server whose model talks as long as a test wants, at the pace it wants, run as the command runs it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

import gptoss_lite
from gptoss_lite.engine import Engine
from gptoss_lite.serve.app import create_app
from gptoss_lite.serve.run import bind, make_server
from gptoss_lite.serve.service import Service
from gptoss_lite.serve.settings import Settings
from gptoss_lite.tokenizer import Tokenizer, load_tokenizer
from tests.raw_http import PATIENCE, Raw, Reply
from tests.scripted import ScriptedModel

DEMO = Path(gptoss_lite.__file__).parent / "demo"
MODEL = "talker"
CHAT = "/v1/chat/completions"


@dataclass(slots=True)
class Talker:
    """A server on a port, its model and its engine."""

    port: int
    model: ScriptedModel
    engine: Engine
    service: Service
    _room: int = field(init=False)

    def __post_init__(self) -> None:
        self._room = self.engine.free_tokens

    def connect(self) -> Raw:
        """Open a connection."""
        return Raw(self.port)

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> Reply:
        """Ask for a chat, see `chat`, on a connection of its own; read the answer."""
        return self.post(CHAT, chat(**fields), **(headers or {}))

    def post(self, path: str, body: object, **headers: str) -> Reply:
        """Send a body on a connection of its own; read the answer."""
        with self.connect() as raw:
            raw.post(path, body, **headers)
            return raw.reply()

    def get(self, path: str, **headers: str) -> Reply:
        """Ask for a path on a connection of its own."""
        with self.connect() as raw:
            return raw.get(path, **headers)

    def metrics(self) -> dict[str, float]:
        """Return the server's counters and gauges, by their names and labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("gptoss_lite_"): float(value) for name, value in pairs}

    def is_at_rest(self) -> bool:
        """Whether nothing runs or waits, and every block is free."""
        return not self.engine.has_work and self.engine.free_tokens == self._room


def chat(**fields: Any) -> dict[str, Any]:
    """Return the body of a chat of one message, with other fields than it has by default."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Talk."}], **fields}


@contextmanager
def talking(
    *,
    length: int = 20,
    seconds: float = 0.0,
    max_sequences: int = 16,
    context: int = 4096,
    send_buffer: int | None = None,
    **settings: Any,
) -> Iterator[Talker]:
    """Run a server while the block runs.

    length: tokens of an answer; seconds: how long a step takes; send_buffer: bytes that the system takes for
    a client that does not read.
    """
    tokenizer = demo_tokenizer()
    opening = [tokenizer.special["<|channel|>"], *tokenizer.encode("final"), tokenizer.special["<|message|>"]]
    words = tokenizer.encode(" and so on")
    said = (opening + words * length)[: length - 1]
    model = ScriptedModel(DEMO, tokenizer, lambda _prompt: said, context)
    model.seconds = seconds
    engine = Engine(model, max_sequences=max_sequences)
    app = create_app(engine, tokenizer, Settings(MODEL, date="2026-01-01", **settings))
    with running(app, send_buffer) as port:
        yield Talker(port, model, engine, app.state.service)


@contextmanager
def running(app: Starlette, send_buffer: int | None = None) -> Iterator[int]:
    """Run an app as the command does, in a thread, while the block runs; yields its port."""
    listener = bind("127.0.0.1", 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port: int = listener.getsockname()[1]
    started = threading.Event()
    server = make_server(app, 1, started.set)
    thread = threading.Thread(target=server.run, args=([listener],), name="server")
    thread.start()
    try:
        assert started.wait(PATIENCE)
        yield port
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@cache
def demo_tokenizer() -> Tokenizer:
    """Return the demo's tokenizer, read once."""
    return load_tokenizer(DEMO, 4096)


def wait_until(holds: Callable[[], bool]) -> None:
    """Return as soon as something holds; AssertionError if it never does."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)
