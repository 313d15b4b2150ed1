"""What /v1/chat/completions takes, as OpenAI's API spells it."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from gptoss_lite.serve.fields import MOST_LOGPROBS, CompletionFields, TokenCount
from gptoss_lite.serve.wire import Record


class TextPart(Record, tag_field="type", tag="text"):
    """A part of a message's content; gpt-oss reads text only."""

    text: str


Text = str | list[TextPart]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\s<|\\/>]+$")]
Nothing = Annotated[list[Any], Meta(max_length=0)] | None  # fields that clients send back empty


class SystemMessage(Record, tag_field="role", tag="system"):
    """Joins the developer's instructions, before theirs."""

    content: Text
    name: Name | None = None


class DeveloperMessage(Record, tag_field="role", tag="developer"):
    """The developer's instructions."""

    content: Text
    name: Name | None = None


class UserMessage(Record, tag_field="role", tag="user"):
    """What the user says."""

    content: Text
    name: Name | None = None


class CalledFunction(Record):
    """A call's function and its arguments, in JSON."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Record):
    """A call that the model made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class AssistantMessage(Record, tag_field="role", tag="assistant"):
    """A turn of the model's; its reasoning may come under each of three names."""

    content: Text | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing = None


class ToolMessage(Record, tag_field="role", tag="tool"):
    """A tool's answer to a call."""

    content: Text
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(Record):
    """A function that may be called; strict: its arguments must follow the schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Record):
    """A tool; functions are what there is."""

    type: Literal["function"]
    function: Function


class FunctionName(Record):
    """The name of one of the functions offered."""

    name: str


class NamedTool(Record, tag_field="type", tag="function"):
    """The function that must be called."""

    function: FunctionName


class AllowedTools(Record):
    """Some of the tools, which alone may be called, or one of which must."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(Record, tag_field="type", tag="allowed_tools"):
    """The choice of some of the tools."""

    allowed_tools: AllowedTools


class TextFormat(Record, tag_field="type", tag="text"):
    """An answer in plain words."""


class JsonObjectFormat(Record, tag_field="type", tag="json_object"):
    """An answer that is a JSON object."""


class JsonSchema(Record):
    """A schema and its name."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Record, tag_field="type", tag="json_schema"):
    """An answer in JSON that follows a schema."""

    json_schema: JsonSchema


class ChatRequest(CompletionFields, kw_only=True):
    """The body of a chat completion."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    reasoning_effort: str | None = None
    reasoning_budget: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
