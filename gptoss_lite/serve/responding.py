"""One job's answer to one HTTP request, as a stream of server-sent events or whole."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptoss_lite.errors import GptOssError, RequestError
from gptoss_lite.serve.errors import ApiError
from gptoss_lite.serve.service import Answer, Events, Job, Service
from gptoss_lite.serve.wire import encode, refused

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_NOBODY_THERE = 499  # nginx's number for a client that has left
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class View(Protocol):
    """Puts one answer's events into the form that an endpoint has for them."""

    def feed(self, events: Events) -> bytes:
        """Take events; return what a stream carries of them, perhaps nothing."""

    def finish(self, answer: Answer) -> bytes:
        """Return the end of a stream."""

    def body(self, answer: Answer) -> Any:
        """Return the whole, when it is no stream."""

    def failed(self, error: dict[str, Any]) -> bytes:
        """Return the end of a stream that something went wrong with."""


async def respond(
    service: Service, job: Job, view: View, *, stream: bool, receive: Receive, scope: Scope
) -> Response:
    """Begin a job and answer with it; raises what `Service.begin` raises, and without a stream what fails."""
    answer = service.begin(job)
    scope["state"]["account"] = answer.account
    if stream:
        return _EventStream(service, answer, view)
    with _closing(answer), _beside(_watch(receive, answer)):
        async for events in answer:
            view.feed(events)
        if answer.abandoned:
            return Response(status_code=_NOBODY_THERE)
        return Response(encode(view.body(answer)), media_type="application/json")


class _EventStream(Response):
    """Sends what comes of an answer as it comes: one write for all that one step brought."""

    def __init__(self, service: Service, answer: Answer, view: View) -> None:
        self.background = None
        self.status_code = 200
        self._answer, self._view = answer, view
        self._silence = service.settings.keep_alive_seconds / 2
        self._silent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette's Response."""
        answer, view = self._answer, self._view
        with _closing(answer), _beside(_watch(receive, answer)), _beside(self._keep_alive(send)):
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            try:
                async for events in answer:
                    if part := view.feed(events):
                        self._silent = False
                        await _write(send, part)
                if not answer.abandoned:
                    await _write(send, view.finish(answer), more=False)
            except Exception as error:
                await _write(send, view.failed(error_of(error).body), more=False)
                if not isinstance(error, GptOssError):
                    raise  # to be logged

    async def _keep_alive(self, send: Send) -> None:
        """Tell the client that the line is up, whenever nothing else was written for a while."""
        while True:
            self._silent = True
            await asyncio.sleep(self._silence)
            if self._silent:
                await _write(send, KEEP_ALIVE)


async def _write(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def error_of(error: Exception) -> ApiError:
    """Turn what made a request fail into what its client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return refused(error)
    return ApiError(f"the model failed: {error}", 500)


@contextlib.contextmanager
def _closing(answer: Answer) -> Iterator[None]:
    try:
        yield
    finally:
        answer.close()


@contextlib.contextmanager
def _beside(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Let something go on for as long as the block runs."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


async def _watch(receive: Receive, answer: Answer) -> None:
    """Abandon an answer as soon as its client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.abandon()


def data(record: Any) -> bytes:
    """Write a server-sent event without a name."""
    return b"data: %b\n\n" % encode(record)
