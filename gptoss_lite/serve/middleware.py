"""What every request passes before an endpoint sees it: log, key, size and time; plain ASGI, no copies."""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from hashlib import sha256
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_lite.serve.errors import ApiError
from gptoss_lite.serve.metrics import Metrics
from gptoss_lite.serve.wire import encode

access_log = logging.getLogger("gptoss_lite.access")
GUARDED = "/v1/"
_PORT = re.compile(r":\d*$")


def error_response(error: ApiError) -> Response:
    """Answer with an error's body."""
    return Response(encode(error.body), error.status, headers=error.headers, media_type="application/json")


class AccessLog:
    """Writes one JSON line per request, and counts it: never what was said."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 0
        state = scope.setdefault("state", {})
        request_id = state.get("request_id") or uuid.uuid4().hex  # a gateway's, which its client knows

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self._write(scope, request_id, status, time.perf_counter() - begun)

    def _write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"  # a metric's labels must be few
        self._metrics.requests.labels(path, str(status or 500)).inc()
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": request_id,
            "client": (scope.get("client") or ("?",))[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status or 500,
            "ms": round(1000 * seconds, 1),
        }
        if account := scope["state"].get("account"):
            line["finish_reasons"] = account.finish_reasons
            if account.first_token_seconds is not None:
                line["first_token_ms"] = round(1000 * account.first_token_seconds, 1)
            if usage := account.usage:
                line |= {
                    "prompt_tokens": usage.prompt_tokens,
                    "cached_tokens": usage.cached_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "reasoning_tokens": usage.reasoning_tokens,
                }
        access_log.info(json.dumps(line))


class Hosts:
    """Answers to the server's own names alone, so that no page reaches it through a name of that page's."""

    def __init__(self, app: ASGIApp, names: tuple[str, ...]) -> None:
        self.app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        name = _PORT.sub("", host).strip("[]")
        if name not in self._names:
            refusal = ApiError(
                f"this server does not answer to the name {name[:100]!r}: --allowed-host makes it", 421
            )
            return await error_response(refusal)(scope, receive, send)
        await self.app(scope, receive, send)


class Keys:
    """Lets only those in who have a key, and gives each key a salt: nothing cached is shared between keys."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith(GUARDED) or not self._digests:
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = sha256(key.strip()).digest()
        # Every key is compared, in constant time each: how long it takes tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            message = (
                "no API key was given: send `Authorization: Bearer KEY`"
                if not key
                else "the API key is wrong"
            )
            refusal = ApiError(message, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            return await error_response(refusal)(scope, receive, send)
        scope["state"]["salt"] = sha256(b"cache" + given).digest()
        await self.app(scope, receive, send)


async def read_body(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes:
    """Read a JSON request's body; ApiError if it is something else, too long, or too long in coming."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":  # what a page of another origin may send without asking is never this
        raise ApiError(f"content-type is {kind.decode('latin-1')[:100]!r}: send application/json", 415)
    announced = headers.get(b"content-length", b"0")
    # Who asks first sends no body now; the rest of another's is skipped, so that its client gets to read why.
    then = _CLOSE if b"expect" in headers else None
    too_long = ApiError(f"the body has more than {most} bytes", 413, headers=then)
    if announced.isdigit() and int(announced[:20]) > most:
        raise too_long
    parts, length = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError("the client left before its request was complete", 400)
                parts.append(message.get("body", b""))
                length += len(parts[-1])
                if length > most:
                    raise too_long
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(f"the body took more than {seconds:g} s to arrive", 408, headers=_CLOSE) from None


_CLOSE = {"Connection": "close"}  # the body is not waited for
