"""The ASGI application: which paths there are, and what every request passes on its way to them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gptoss_lite.engine import Engine
from gptoss_lite.errors import GptOssError
from gptoss_lite.serve import chat, completions, responses
from gptoss_lite.serve.errors import ApiError, error_body
from gptoss_lite.serve.middleware import AccessLog, Hosts, Keys, error_response, read_body
from gptoss_lite.serve.openapi import document
from gptoss_lite.serve.page import page_routes
from gptoss_lite.serve.responding import View, error_of, respond
from gptoss_lite.serve.service import Job, Service
from gptoss_lite.serve.settings import Settings
from gptoss_lite.tokenizer import Tokenizer

Endpoint = Callable[[Request], Awaitable[Response]]
Reader = Callable[[bytes, Service, bytes], Awaitable[tuple[Job, View, bool]]]
_STARTED = 1756684800  # OpenAI published the models in August 2025


def create_app(engine: Engine, tokenizer: Tokenizer, settings: Settings) -> Starlette:
    """Make the server of one model; the engine belongs to it from now on.

    Its `state.service` can `drain`, and `cut` what is under way, before it is shut down.
    """
    service = Service(engine, tokenizer, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    routes = [
        *page_routes(),
        _answering("/v1/chat/completions", chat.read, service),
        _answering("/v1/completions", completions.read, service),
        _answering("/v1/responses", responses.read, service),
        Route("/v1/models", _models(service), methods=["GET"]),
        Route("/v1/models/{model:path}", _model(service), methods=["GET"]),
        Route("/health", _health(service), methods=["GET"]),
        Route("/metrics", _metrics(service), methods=["GET"]),
        Route("/openapi.json", _openapi(settings), methods=["GET"]),
    ]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(AccessLog, metrics=service.metrics, paths=paths)]
    if settings.allowed_hosts:
        middleware.append(Middleware(Hosts, names=settings.allowed_hosts))
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's own client sends a dozen
                expose_headers=["retry-after", "x-request-id"],
            )
        )
    middleware.append(Middleware(Keys, keys=settings.api_keys))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            GptOssError: _tell_error,
            HTTPException: _tell_http_error,
            Exception: _tell_bug,
        },
    )
    app.state.service = service
    return app


def _answering(path: str, read: Reader, service: Service) -> Route:
    """Make the route of an endpoint whose answers the model writes."""

    async def endpoint(request: Request) -> Response:
        settings, salt = service.settings, request.scope["state"].get("salt", b"")
        body = await read_body(request.scope, request.receive, settings.max_body, settings.body_seconds)
        job, view, stream = await read(body, service, salt)
        return await respond(service, job, view, stream=stream, receive=request.receive, scope=request.scope)

    return Route(path, endpoint, methods=["POST"])


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model,
        "object": "model",
        "created": _STARTED,
        "owned_by": "openai",
        "context_length": service.context,
    }


def _models(service: Service) -> Endpoint:
    def endpoint(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(service)]})

    return _plain(endpoint)


def _model(service: Service) -> Endpoint:
    def endpoint(request: Request) -> Response:
        service.check_model(request.path_params["model"])
        return JSONResponse(_card(service))

    return _plain(endpoint)


def _health(service: Service) -> Endpoint:
    def endpoint(_request: Request) -> Response:
        status = "ok" if service.healthy else "draining" if service.draining else "failed"
        return JSONResponse({"status": status}, 200 if service.healthy else 503)

    return _plain(endpoint)


def _metrics(service: Service) -> Endpoint:
    def endpoint(_request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=1.0.0")

    return _plain(endpoint)


def _openapi(settings: Settings) -> Endpoint:
    def endpoint(_request: Request) -> Response:
        return JSONResponse(document(settings))

    return _plain(endpoint)


def _plain(endpoint: Callable[[Request], Response]) -> Endpoint:
    """Let a function that does not wait run in the loop: Starlette would give it a thread."""

    async def run(request: Request) -> Response:
        return endpoint(request)

    return run


async def _tell_error(_request: Request, error: Exception) -> Response:
    return error_response(error_of(error))


async def _tell_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    what = {404: f"there is no {path}", 405: f"{path} takes no {request.method}"}
    body = error_body(what.get(error.status_code, str(error.detail)), error.status_code)
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _tell_bug(_request: Request, _error: Exception) -> Response:
    return error_response(ApiError("the server met an error of its own; its log says which", 500))
