"""/v1/responses: a conversation in, the items of the next turn out; stateless."""

import re
from typing import Any

import msgspec

from gptoss_lite.errors import RequestError
from gptoss_lite.serve.response_types import (
    AllowedFunctions,
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    ResponseRequest,
    SchemaFormat,
)
from gptoss_lite.serve.response_view import ResponseView
from gptoss_lite.serve.service import Job, Service
from gptoss_lite.serve.turn import ToolChoice, Turn, chat_job, prompt_of
from gptoss_lite.serve.wire import builtin, convert, decode

_decoder = msgspec.json.Decoder(ResponseRequest)
LOGPROBS = "message.output_text.logprobs"
_OWN_NAMES = {
    r"reasoning_effort": "reasoning.effort",
    r"response_format(\.json_schema)?": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
}


async def read(body: bytes, service: Service, salt: bytes) -> tuple[Job, ResponseView, bool]:
    """Read a request: the job, how to answer, and if as a stream; RequestError, ApiError name a field."""
    try:
        request, turn, tokens = await service.read(_read, body, service, salt)
        wants_logprobs = request.top_logprobs is not None or LOGPROBS in (request.include or ())
        job = await chat_job(
            service,
            turn,
            tokens,
            request,
            max_tokens=request.max_output_tokens,
            logprobs=(request.top_logprobs or 0) if wants_logprobs else None,
            salt=salt,
        )
    except RequestError as error:
        raise _renamed(error) from None
    return job, ResponseView(service, request, wants_logprobs), bool(request.stream)


def _read(body: bytes, service: Service, salt: bytes) -> tuple[ResponseRequest, Turn, list[int]]:
    request = decode(body, _decoder)
    service.check_model(request.model)
    turn = _turn(request)
    return request, turn, prompt_of(turn, service, salt)


def _renamed(error: RequestError) -> RequestError:
    """Call what is wrong with a turn as this API does: it was found under the name that chat has for it."""
    text = str(error)
    for name, own in _OWN_NAMES.items():
        text = re.sub(f"^{name}", own, text)
    return RequestError(text)


def _turn(request: ResponseRequest) -> Turn:
    effort = request.reasoning.effort if request.reasoning else None
    return Turn(
        "input",
        [{"role": "user", "content": request.input}]
        if isinstance(request.input, str)
        else _messages(request.input),
        "medium" if effort is None else effort,
        request.instructions,
        tools=[{"type": "function", "function": _without_type(tool)} for tool in request.tools or ()],
        tool_choice=_tool_choice(request),
        response_format=_response_format(request),
        reasoning_budget=request.reasoning_budget,
    )


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn items into messages as chat completions have them, a turn's items into one."""
    messages: list[dict[str, Any]] = []
    calls = set()
    for i, fields in enumerate(items):
        item = convert({"type": "message", **fields}, Item, f"input[{i}]")
        if isinstance(item, FunctionCallItem):
            calls.add(item.call_id)
        elif isinstance(item, FunctionCallOutputItem) and item.call_id not in calls:
            raise RequestError(f"input[{i}].call_id {item.call_id[:100]!r} is of no function_call before it")
        message = _message(item)
        if message["role"] == "assistant" and messages and messages[-1]["role"] == "assistant":
            _join(messages[-1], message)
        else:
            messages.append(message)
    return [message for message in messages if message != {"role": "assistant", "reasoning": ""}]


def _message(item: Item) -> dict[str, Any]:
    match item:
        case MessageItem(role=role, content=content):
            return {"role": role, "content": _text(content)}
        case ReasoningItem(content=content):
            return {"role": "assistant", "reasoning": _text(content or [])}
        case FunctionCallItem(call_id=call_id, name=name, arguments=arguments):
            function = {"name": name, "arguments": arguments}
            return {
                "role": "assistant",
                "tool_calls": [{"id": call_id, "type": "function", "function": function}],
            }
        case FunctionCallOutputItem(call_id=call_id, output=output):
            return {"role": "tool", "tool_call_id": call_id, "content": _text(output)}


def _join(turn: dict[str, Any], more: dict[str, Any]) -> None:
    """Add what comes later in a turn to what came before."""
    for name, value in more.items():
        if name != "role":
            turn[name] = turn[name] + value if name in turn else value


def _text(content: str | Any) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _without_type(tool: msgspec.Struct) -> dict[str, Any]:
    return {name: value for name, value in builtin(tool).items() if name != "type"}


def _response_format(request: ResponseRequest) -> dict[str, Any] | None:
    form = request.text and request.text.format
    if isinstance(form, SchemaFormat):
        return {"type": "json_schema", "json_schema": _without_type(form)}
    return None if form is None else builtin(form)


def _tool_choice(request: ResponseRequest) -> ToolChoice:
    match request.tool_choice:
        case None:
            return ToolChoice()
        case NamedFunction(name=name):
            return ToolChoice("required", frozenset([name]))
        case AllowedFunctions(mode=mode, tools=tools):
            return ToolChoice(mode, frozenset(tool.name for tool in tools))
        case mode:
            return ToolChoice(mode)
