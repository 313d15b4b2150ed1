"""One engine in a process of its own: the single server's application, asked over Ray instead of a socket."""

import asyncio
from collections.abc import AsyncIterator

from ray import serve
from starlette.types import Message, Scope

import gptoss_lite as gl
from deploy.local import stay_local
from deploy.options import Options
from gptoss_lite.engine import Engine
from gptoss_lite.serve.app import create_app
from gptoss_lite.serve.run import log_to_stderr, warm_up

_LAST_WRITES = 2  # seconds, for what was cut to be told
_PACE = 0.02  # seconds; a message costs Ray a millisecond or two, so what comes faster goes together


class Replica:
    """Loads the model, and answers requests that have arrived whole."""

    def __init__(self, options: Options, threads: int | None) -> None:
        stay_local()
        log_to_stderr(access=options.access_log)
        model, tokenizer = gl.load(
            options.model,
            options.device,
            threads=threads,
            device_memory=options.device_memory,
            cache_tokens=options.cache_tokens,
            activations=options.activations,
            dense=options.dense,
        )
        engine = Engine(model, max_sequences=options.max_sequences)
        warm_up(engine)
        self._app = create_app(engine, tokenizer, options.settings)
        self._service = self._app.state.service
        self._drain_seconds = options.drain_seconds
        self._answering: set[asyncio.Task[None]] = set()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """Run the application on a request; yields its ASGI messages, those of 20 ms together.

        Cancelling frees what the request holds in the engine.
        """
        sent: asyncio.Queue[Message] = asyncio.Queue()
        run = asyncio.create_task(self._run(scope, body, sent))
        self._answering.add(run)
        run.add_done_callback(self._answering.discard)
        try:
            while (messages := await _take(sent))[-1]:
                yield messages
                await asyncio.sleep(_PACE)
            yield messages[:-1]
            await run
        finally:
            run.cancel()

    async def whole(self, scope: Scope) -> tuple[str, int, bytes]:
        """Answer a request that has no body; returns this replica's name, the status and the body."""
        [start, *rest] = [message async for messages in self.answer(scope, b"") for message in messages]
        body = b"".join(message["body"] for message in rest)
        return serve.get_replica_context().replica_id.unique_id, start["status"], body

    async def drain(self) -> None:
        """Take no more requests; return when those under way have come to their end, or been cut there."""
        self._service.drain()
        if self._answering:
            await asyncio.wait(self._answering, timeout=self._drain_seconds)
        self._service.cut()
        if self._answering:
            await asyncio.wait(self._answering, timeout=_LAST_WRITES)

    def check_health(self) -> None:
        """Raise when the engine has stopped: Ray then puts another replica in place of this one."""
        if not self._service.engine.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()

    async def _run(self, scope: Scope, body: bytes, sent: "asyncio.Queue[Message]") -> None:
        """Put the application's messages into a queue, and an empty one after the last."""
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            return await asyncio.Future()  # when the client leaves, all of this is cancelled

        try:
            await self._app(scope, receive, sent.put)
        finally:
            sent.put_nowait({})


async def _take(sent: "asyncio.Queue[Message]") -> list[Message]:
    """Wait for a message; return all that are there."""
    messages = [await sent.get()]
    while not sent.empty():
        messages.append(sent.get_nowait())
    return messages
