"""The OpenAPI document, made of the very records that requests are read into."""

from typing import Any

import msgspec

from gptoss_lite import __version__
from gptoss_lite.serve.chat_types import ChatRequest
from gptoss_lite.serve.completions import Completion, CompletionRequest
from gptoss_lite.serve.replies import ChatCompletion
from gptoss_lite.serve.response_types import Item, ResponseRequest
from gptoss_lite.serve.settings import Settings

_REF = "#/components/schemas/{name}"


def document(settings: Settings) -> dict[str, Any]:
    """Describe the server in OpenAPI 3.1."""
    kinds = [ChatRequest, ChatCompletion, CompletionRequest, Completion, ResponseRequest, Item]
    (chat, chat_reply, completion, completion_reply, response, item), schemas = (
        msgspec.json.schema_components(kinds, ref_template=_REF)
    )
    for body in ("ChatRequest", "CompletionRequest", "ResponseRequest"):
        schemas[body]["properties"]["model"] = {"const": settings.model}
    listed = schemas["ResponseRequest"]["properties"]["input"]["anyOf"]
    next(option for option in listed if "items" in option)["items"] = item
    any_object = {"type": "object"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptoss-lite", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _operation("createChatCompletion", chat, chat_reply)},
            "/v1/completions": {"post": _operation("createCompletion", completion, completion_reply)},
            "/v1/responses": {"post": _operation("createResponse", response, any_object)},
            "/v1/models": {"get": _operation("listModels", None, any_object)},
            "/v1/models/{model}": {
                "get": {
                    **_operation("retrieveModel", None, any_object),
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
                    ],
                }
            },
            "/health": {"get": _operation("health", None, any_object)},
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "responses": {"200": {"description": "Prometheus' text", "content": {"text/plain": {}}}},
                }
            },
        },
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if settings.api_keys else [],
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def _operation(name: str, body: Any, reply: Any) -> dict[str, Any]:
    """Describe one path: its body, what it answers, and that anything else is an error's body."""
    error = {"$ref": _REF.format(name="Error")}
    answers = {"application/json": {"schema": reply}}
    operation = {
        "operationId": name,
        "responses": {
            "200": {"description": "done", "content": answers},
            "default": {"description": "an error", "content": {"application/json": {"schema": error}}},
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        answers["text/event-stream"] = {}
    return operation
