"""The typed messages of a harmony conversation, and their dictionary form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

from gptoss_lite.errors import RequestError

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
ReasoningEffort: TypeAlias = Literal["low", "medium", "high"]

ROLES: tuple[str, ...] = get_args(Role)
REASONING_EFFORTS: tuple[str, ...] = get_args(ReasoningEffort)
CHANNELS = ("analysis", "commentary", "final")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is the JSON schema of its argument, None for none."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Namespace:
    """A named group of tools; the caller's own functions live in the namespace ``functions``."""

    name: str
    tools: tuple[Tool, ...] = ()
    description: str | None = None


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """A JSON schema that the final answer should follow."""

    name: str
    schema: dict[str, Any]
    description: str | None = None


@dataclass(frozen=True, slots=True)
class SystemContent:
    """What stands in the system message; a None is left out."""

    model_identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    current_date: str | None = None
    reasoning_effort: ReasoningEffort | None = "medium"
    tools: tuple[Namespace, ...] = ()
    channels: tuple[str, ...] = CHANNELS
    channel_required: bool = True


@dataclass(frozen=True, slots=True)
class DeveloperContent:
    """What stands in the developer message: instructions, function tools, response format."""

    instructions: str | None = None
    tools: tuple[Namespace, ...] = ()
    response_format: ResponseFormat | None = None


Content: TypeAlias = str | SystemContent | DeveloperContent


@dataclass(frozen=True, slots=True)
class Message:
    """One harmony message.

    `name` is that of a user, or of the tool that answers (``functions.f``). `recipient` makes an assistant
    message a call. `tokens` are the ids the model sampled, from ``<|start|>`` to the terminator: a message
    that has them is replayed as it stands instead of being rendered. They take no part in comparison.
    """

    role: Role
    content: tuple[Content, ...] = ()
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    tokens: tuple[int, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """The text parts of the content, joined."""
        return "".join(part for part in self.content if isinstance(part, str))


def conversation_from_dict(data: Mapping[str, Any]) -> tuple[Message, ...]:
    """Read the form that openai-harmony's ``Conversation.to_dict()`` writes; an absent key means None.

    RequestError names a key that is missing or whose value is of the wrong kind.
    """
    messages = take(data, "messages", Sequence, "conversation")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def take(data: Any, key: str, kind: type, where: str, *, optional: bool = False) -> Any:
    """Return ``data[key]`` if of the kind wanted, None if absent and optional; else raise RequestError."""
    if not isinstance(data, Mapping):
        raise RequestError(f"{where} is {describe(data)}: an object is needed")
    value = data.get(key)
    if value is None and optional:
        return None
    if value is None:
        raise RequestError(f"{where} has no {key!r}")
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)):
        needed = {str: "a string", bool: "true or false", Sequence: "a list"}.get(kind, "an object")
        raise RequestError(f"{where}: {key!r} is {describe(value)}: {needed} is needed")
    return value


def describe(value: object) -> str:
    """Return a short, one-line description of a value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def choose(value: Any, choices: Sequence[str], where: str) -> str:
    """Return the value if it is one of the choices; else raise RequestError."""
    if value not in choices:
        raise RequestError(f"{where} is {describe(value)}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    return cast(str, value)


def _message(data: Any, where: str) -> Message:
    role = choose(take(data, "role", str, where), ROLES, f"{where}: role")
    parts = data.get("content")
    if isinstance(parts, str):
        parts = [parts]
    elif not isinstance(parts, Sequence):
        raise RequestError(f"{where}: 'content' is {describe(parts)}: a list or a string is needed")
    return Message(
        cast(Role, role),
        tuple(_content(part, f"{where}.content[{i}]") for i, part in enumerate(parts)),
        name=take(data, "name", str, where, optional=True),
        channel=take(data, "channel", str, where, optional=True),
        recipient=take(data, "recipient", str, where, optional=True),
        content_type=take(data, "content_type", str, where, optional=True),
    )


def _content(data: Any, where: str) -> Content:
    if isinstance(data, str):
        return data
    kinds = ("text", "system_content", "developer_content")
    match choose(take(data, "type", str, where), kinds, f"{where}: type"):
        case "text":
            return cast(str, take(data, "text", str, where))
        case "system_content":
            return _system(data, where)
        case _:
            return DeveloperContent(
                take(data, "instructions", str, where, optional=True), _namespaces(data, where)
            )


def _system(data: Mapping[str, Any], where: str) -> SystemContent:
    effort = take(data, "reasoning_effort", str, where, optional=True)
    if effort is not None:
        effort = choose(effort.lower(), REASONING_EFFORTS, f"{where}: reasoning_effort")
    channels = take(data, "channel_config", Mapping, where, optional=True)
    return SystemContent(
        model_identity=take(data, "model_identity", str, where, optional=True),
        knowledge_cutoff=take(data, "knowledge_cutoff", str, where, optional=True),
        current_date=take(data, "conversation_start_date", str, where, optional=True),
        reasoning_effort=cast(ReasoningEffort | None, effort),
        tools=_namespaces(data, where),
        channels=tuple(take(channels, "valid_channels", Sequence, where)) if channels else (),
        channel_required=bool(channels and take(channels, "channel_required", bool, where)),
    )


def _namespaces(data: Mapping[str, Any], where: str) -> tuple[Namespace, ...]:
    tools = take(data, "tools", Mapping, where, optional=True) or {}
    return tuple(_namespace(tools[key], f"{where}.tools[{key!r}]") for key in sorted(tools))


def _namespace(data: Any, where: str) -> Namespace:
    tools = enumerate(take(data, "tools", Sequence, where))
    return Namespace(
        take(data, "name", str, where),
        tuple(_tool(tool, f"{where}.tools[{i}]") for i, tool in tools),
        take(data, "description", str, where, optional=True),
    )


def _tool(data: Any, where: str) -> Tool:
    return Tool(
        take(data, "name", str, where),
        take(data, "description", str, where),
        take(data, "parameters", dict, where, optional=True),
    )
