"""The web page beside an API that says what a test wants it to say."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gptoss_lite.serve.page import page_routes

MODEL = "gpt-oss-scripted"
USAGE = {
    "prompt_tokens": 1234,
    "completion_tokens": 345,
    "prompt_tokens_details": {"cached_tokens": 1200},
    "completion_tokens_details": {"reasoning_tokens": 45},
}
HOLD = "hold"


@dataclass(slots=True)
class Script:
    """What the server says, and what it was asked.

    pieces: deltas, error bodies, and HOLD, where the stream waits for `go`. is_whole: whether the stream ends
    as it should. key: what a client must show. gone: set once a client has left its stream.
    """

    pieces: list[Any] = field(default_factory=list)
    status: int = 200
    is_whole: bool = True
    key: str | None = None
    go: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)


def deltas(content: str, reasoning: str = "", size: int = 7) -> list[Any]:
    """Cut an answer into pieces of so many characters."""
    thought = [{"reasoning": reasoning[at : at + size]} for at in range(0, len(reasoning), size)]
    return thought + [{"content": content[at : at + size]} for at in range(0, len(content), size)]


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


def chunk(delta: Any, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


async def events(script: Script) -> AsyncIterator[bytes]:
    """Stream the script, each event cut in two, be it within a character."""
    chunks: list[Any] = [chunk({"role": "assistant", "content": ""})]
    chunks += [piece if piece == HOLD or "error" in piece else chunk(piece) for piece in script.pieces]
    if script.is_whole:
        chunks += [chunk({}, "stop"), {"choices": [], "usage": USAGE}, "[DONE]"]
    is_over = False
    try:
        yield b": keep-alive\n\n"
        for each in chunks:
            while each == HOLD and not script.go.is_set():
                await asyncio.sleep(0.005)
            data = each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
            event = b": held\n\n" if each == HOLD else f"data: {data}\n\n".encode()
            yield event[: len(event) // 2]
            yield event[len(event) // 2 :]
        is_over = True
    finally:
        if not is_over:
            script.gone.set()


def scripted(stage: list[Script]) -> Starlette:
    """Serve the page beside an API that follows the script on the stage."""

    def refusal(request: Request) -> Response | None:
        key = stage[0].key
        if key is None or request.headers.get("authorization") == f"Bearer {key}":
            return None
        return JSONResponse(error("Incorrect API key provided."), 401)

    async def models(request: Request) -> Response:
        return refusal(request) or JSONResponse(
            {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
        )

    async def chat(request: Request) -> Response:
        if (refused := refusal(request)) is not None:
            return refused
        script = stage[0]
        script.asked.append(await request.json())
        if script.status != 200:
            return JSONResponse(script.pieces[0], script.status)
        return StreamingResponse(events(script), media_type="text/event-stream")

    api = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    return Starlette(routes=[*page_routes(), *api])
