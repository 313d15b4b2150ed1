"""What stands between Ray's proxy and the replicas: reads a request, and passes on what one answers."""

import asyncio

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from deploy.affinity import conversation
from deploy.counting import merged
from deploy.local import stay_local
from deploy.options import Options
from gptoss_lite.serve.errors import ApiError
from gptoss_lite.serve.middleware import Keys, error_response, read_body
from gptoss_lite.serve.responding import data

_PORTABLE = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client")
_PATIENCE = 10  # seconds for what no model computes
_REQUEST_ID = b"x-request-id"


class Gateway:
    """Passes each request to a replica, those of one conversation to the same, and its answer back."""

    def __init__(self, replicas: DeploymentHandle, options: Options) -> None:
        stay_local()
        self._replicas = replicas
        self._answering = replicas.options(method_name="answer", stream=True)
        self._settings = options.settings

    async def __call__(self, request: Request) -> Response:
        """Answer an HTTP request."""
        headers = dict(request.scope["headers"])
        scope: Scope = {name: request.scope.get(name) for name in _PORTABLE}
        scope["state"] = {"request_id": headers.get(_REQUEST_ID, b"")[:64].decode("latin-1")}
        if scope["path"] == "/metrics":
            return await self._metrics(scope)
        try:
            body = await self._body(scope, request.receive)
        except ApiError as error:
            return error_response(error)
        session = conversation(headers.get(b"authorization", b""), body)
        return _Relayed(self._answering.options(session_id=session), scope, body)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body that a replica will want; of one who has no key, say, it wants none."""
        wanted = False

        async def want(*_: object) -> None:
            nonlocal wanted
            wanted = scope["method"] == "POST"

        async def discard(_: Message) -> None:
            pass

        await Keys(want, self._settings.api_keys)({**scope, "state": {}}, receive, discard)
        if not wanted:
            return b""
        return await read_body(scope, receive, self._settings.max_body, self._settings.body_seconds)

    async def _metrics(self, scope: Scope) -> Response:
        """Put all replicas' counters together, told apart by the label `replica`."""
        try:
            asked = self._replicas.broadcast("whole", scope)
            answers = await asked.results_async(timeout_s=_PATIENCE, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            return error_response(_lost(error))
        answers = [answer for answer in answers if not isinstance(answer, BaseException)]
        for _, status, body in answers:
            if status != 200:
                return Response(body, status, media_type="application/json")
        text = merged((name, body.decode()) for name, _, body in answers)
        return Response(text, media_type="text/plain; version=1.0.0")


class _Relayed(Response):
    """What a replica answers, message by message."""

    def __init__(self, replicas: DeploymentHandle, scope: Scope, body: bytes) -> None:
        self.background = None
        self._replicas, self._scope, self._body = replicas, scope, body
        self._start: Message | None = None
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette's Response."""
        answer = self._replicas.remote(self._scope, self._body)
        try:
            async with asyncio.timeout(_PATIENCE if self._scope["path"] == "/health" else None):
                async for messages in answer:
                    for message in messages:
                        await send(self._passing(message))
        except (RayError, RayServeException, TimeoutError) as error:
            await self._break_off(_lost(error), receive, send)
        finally:
            if not self._complete:
                answer.cancel()

    def _passing(self, message: Message) -> Message:
        """Note how far an answer has come; the request id is put on it again by Ray's proxy."""
        if message["type"] == "http.response.start":
            self._start = message
            message["headers"] = [header for header in message["headers"] if header[0] != _REQUEST_ID]
        self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        return message

    async def _break_off(self, error: ApiError, receive: Receive, send: Send) -> None:
        """Tell a client that no more will come of its answer."""
        if self._start is None:
            await error_response(error)(self._scope, receive, send)
        elif not self._complete:
            streamed = any(b"text/event-stream" in value for _, value in self._start["headers"])
            # Any other answer has told its length: that it ends too early is seen.
            await send({"type": "http.response.body", "body": data(error.body) if streamed else b""})


def _lost(error: Exception) -> ApiError:
    if isinstance(error, RayActorError | RayServeException | TimeoutError):
        message = "the replica that was to answer is gone: ask again"
        return ApiError(message, 503, headers={"Retry-After": "1"})
    return ApiError("the server met an error of its own; its log says which", 500)
