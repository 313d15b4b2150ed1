"""OpenAI-style chat messages to a harmony conversation."""

import datetime
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from gptoss_lite.errors import RequestError
from gptoss_lite.harmony.builtin import BUILTIN_TOOLS
from gptoss_lite.harmony.messages import (
    REASONING_EFFORTS,
    ROLES,
    DeveloperContent,
    Message,
    Namespace,
    ReasoningEffort,
    ResponseFormat,
    SystemContent,
    Tool,
    choose,
    describe,
    take,
)
from gptoss_lite.harmony.render import CONSTRAIN, FUNCTIONS
from gptoss_lite.harmony.typescript import compact_json

REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
TOOL_NAME = re.compile(r"[\w.-]+")


def from_chat(
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    reasoning_effort: str = "medium",
    instructions: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
    date: str | datetime.date | None = None,
    recall: Callable[[tuple[Message, ...]], tuple[Message, ...]] = tuple,
) -> tuple[Message, ...]:
    """Return the harmony conversation for chat messages as the OpenAI API spells them.

    The system message is made here, from effort and date (default: today); what clients say as system or
    developer goes into the developer message: `instructions`, then all system texts, then all developer
    texts. An assistant's reasoning may come as ``reasoning``, ``reasoning_content`` or ``thinking``.
    `tools` are functions, or ``{"type": "browser"}`` and ``{"type": "python"}``. A harmony `Message`, as
    `turn_messages` gives it, stands as it is. recall: exchanges an assistant's messages, as they are read
    from one of the dictionaries, for those that the model wrote. RequestError names what is missing or of
    the wrong kind.
    """
    effort = cast(ReasoningEffort, choose(reasoning_effort, REASONING_EFFORTS, "reasoning_effort"))
    functions, builtin = _tools(tools or ())
    briefs: dict[str, list[str]] = {"system": [], "developer": []}
    conversation: list[Message] = []
    call_names: dict[str, str] = {}
    for i, message in enumerate(_checked_list(messages, "messages")):
        where = f"messages[{i}]"
        if isinstance(message, Message):
            conversation.append(message)
            continue
        match choose(take(message, "role", str, where), ROLES, f"{where}: role"):
            case "system" | "developer" as role:
                briefs[role].append(_text(message, where))
            case "user":
                name = take(message, "name", str, where, optional=True)
                conversation.append(Message("user", (_text(message, where),), name=name))
            case "assistant":
                conversation += recall(tuple(_assistant(message, where, call_names)))
            case "tool":
                conversation.append(_tool_result(message, where, call_names))
    system = SystemContent(current_date=_date(date), reasoning_effort=effort, tools=builtin)
    if not isinstance(instructions, str | None):
        raise RequestError(f"instructions is {describe(instructions)}: a string is needed")
    texts = [text for text in (instructions, *briefs["system"], *briefs["developer"]) if text]
    developer = DeveloperContent(
        instructions="\n\n".join(texts) or None,
        tools=(Namespace(FUNCTIONS, functions),) if functions else (),
        response_format=_response_format(response_format),
    )
    head = [Message("system", (system,))]
    if developer != DeveloperContent():
        head.append(Message("developer", (developer,)))
    return (*head, *conversation)


def call_name(recipient: str | None) -> str:
    """Return the name of the function that a call is to, in a form that may come back."""
    name = (recipient or "").removeprefix(f"{FUNCTIONS}.")
    return re.sub(r"[^\w.-]", "_", name) or FUNCTIONS


def _date(date: Any) -> str:
    """Return YYYY-MM-DD, today's if there is none given."""
    try:
        parsed = datetime.date.fromisoformat(date) if isinstance(date, str) else date or datetime.date.today()
        return f"{parsed:%Y-%m-%d}"
    except (TypeError, ValueError):
        raise RequestError(f"date is {describe(date)}: a date or 'YYYY-MM-DD' is needed") from None


def _checked_list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError(f"{where} is {describe(value)}: a list is needed")
    return value


def _text(message: Mapping[str, Any], where: str) -> str:
    """Return the content, a string or a list of text parts, as one string."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        raise RequestError(f"{where} has no 'content'")
    return "".join(
        _part(part, f"{where}.content[{i}]")
        for i, part in enumerate(_checked_list(content, f"{where}: 'content'"))
    )


def _part(part: Any, where: str) -> str:
    kind = take(part, "type", str, where)
    if kind != "text":
        raise RequestError(f"{where} is of type {kind!r}: gpt-oss reads text only")
    return cast(str, take(part, "text", str, where))


def _assistant(message: Mapping[str, Any], where: str, call_names: dict[str, str]) -> Iterable[Message]:
    reasonings = [take(message, key, str, where, optional=True) for key in REASONING_KEYS]
    reasoning = next(filter(None, reasonings), None)
    calls = take(message, "tool_calls", Sequence, where, optional=True) or ()
    content = None if message.get("content") is None else _text(message, where)
    if content is None and not reasoning and not calls:
        raise RequestError(f"{where} has none of 'content', 'tool_calls' and 'reasoning'")
    if reasoning:
        yield Message("assistant", (reasoning,), channel="analysis")
    if content or (content is not None and not calls):
        yield Message("assistant", (content,), channel="commentary" if calls else "final")
    for i, call in enumerate(calls):
        yield _call(call, f"{where}.tool_calls[{i}]", call_names)


def _call(call: Any, where: str, call_names: dict[str, str]) -> Message:
    function = take(call, "function", Mapping, where)
    name = f"{FUNCTIONS}.{_tool_name(function, f'{where}.function')}"
    call_names[take(call, "id", str, where)] = name
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = compact_json(dict(arguments))
    elif not isinstance(arguments, str):
        raise RequestError(f"{where}.function: 'arguments' is {describe(arguments)}: a JSON string is needed")
    return Message(
        "assistant", (arguments,), channel="commentary", recipient=name, content_type=f"{CONSTRAIN}json"
    )


def _tool_result(message: Mapping[str, Any], where: str, call_names: Mapping[str, str]) -> Message:
    call = take(message, "tool_call_id", str, where, optional=True)
    if call in call_names:
        name = call_names[call]
    elif message.get("name") is not None:
        name = _tool_name(message, where)
        name = name if "." in name or name in BUILTIN_TOOLS else f"{FUNCTIONS}.{name}"
    elif call is None:
        raise RequestError(f"{where} has no 'tool_call_id'")
    else:
        raise RequestError(f"{where}: 'tool_call_id' {describe(call)} is of no tool call before it")
    return Message("tool", (_text(message, where),), name=name, channel="commentary", recipient="assistant")


def _tools(tools: Any) -> tuple[tuple[Tool, ...], tuple[Namespace, ...]]:
    functions: dict[str, Tool] = {}
    builtin: dict[str, Namespace] = {}
    for i, tool in enumerate(_checked_list(tools, "tools")):
        where = f"tools[{i}]"
        kind = choose(take(tool, "type", str, where), ("function", *BUILTIN_TOOLS), f"{where}: type")
        if kind != "function":
            builtin[kind] = BUILTIN_TOOLS[kind]
            continue
        function, where = take(tool, "function", Mapping, where), f"{where}.function"
        name = _tool_name(function, where)
        if name in functions:
            raise RequestError(f"{where}: a tool named {name!r} is there already")
        description = take(function, "description", str, where, optional=True) or ""
        functions[name] = Tool(name, description, take(function, "parameters", dict, where, optional=True))
    return tuple(functions.values()), tuple(builtin.values())


def _tool_name(data: Mapping[str, Any], where: str) -> str:
    name: str = take(data, "name", str, where)
    if not TOOL_NAME.fullmatch(name):
        raise RequestError(f"{where}: name {describe(name)} may hold letters, digits, '_', '-' and '.' only")
    return name


def _response_format(form: Any) -> ResponseFormat | None:
    if form is None:
        return None
    kinds = ("text", "json_object", "json_schema")
    match choose(take(form, "type", str, "response_format"), kinds, "response_format: type"):
        case "text":
            return None
        case "json_object":
            return ResponseFormat("json_object", {"type": "object"}, "Any JSON object.")
    where = "response_format.json_schema"
    schema = take(form, "json_schema", Mapping, "response_format")
    return ResponseFormat(
        take(schema, "name", str, where),
        take(schema, "schema", dict, where),
        take(schema, "description", str, where, optional=True),
    )
