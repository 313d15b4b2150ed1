"""What /v1/responses takes, as OpenAI's API spells it; nothing is stored, so nothing can be referred to."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from gptoss_lite.serve.chat_types import JsonObjectFormat, JsonSchema, Nothing, TextFormat
from gptoss_lite.serve.fields import MOST_LOGPROBS, Choosing, TokenCount
from gptoss_lite.serve.wire import Record

Status = Literal["in_progress", "completed", "incomplete"] | None


class InputText(Record, tag_field="type", tag="input_text"):
    """Text that is said to the model."""

    text: str


class OutputText(Record, tag_field="type", tag="output_text"):
    """Text that the model said."""

    text: str
    annotations: Nothing = None
    logprobs: list[Any] | None = None


class ReasoningText(Record, tag_field="type", tag="reasoning_text"):
    """Text that the model thought."""

    text: str


class MessageItem(Record, tag_field="type", tag="message"):
    """A message; the model's own have an id and a status."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText]
    id: str | None = None
    status: Status = None


class ReasoningItem(Record, tag_field="type", tag="reasoning"):
    """Reasoning of an earlier turn."""

    id: str | None = None
    summary: list[Any] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status = None


class FunctionCallItem(Record, tag_field="type", tag="function_call"):
    """A call that the model made."""

    call_id: str
    name: Annotated[str, Meta(pattern=r"^[\w.-]+$")]
    arguments: str
    id: str | None = None
    status: Status = None


class FunctionCallOutputItem(Record, tag_field="type", tag="function_call_output"):
    """A tool's answer to a call."""

    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: Status = None


Item = MessageItem | ReasoningItem | FunctionCallItem | FunctionCallOutputItem


class FunctionTool(Record):
    """A function that may be called; strict: its arguments must follow the schema."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Record, tag_field="type", tag="function"):
    """The function that must be called."""

    name: str


class AllowedFunctions(Record, tag_field="type", tag="allowed_tools"):
    """Some of the tools, which alone may be called, or one of which must."""

    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


class SchemaFormat(JsonSchema, tag_field="type", tag="json_schema"):
    """An answer in JSON that follows a schema."""


class TextOptions(Record):
    """What form the answer has."""

    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Record):
    """How long to think; the whole reasoning comes as `content`, there is no summary of it."""

    effort: str | None = None
    summary: Literal["auto"] | None = None
    generate_summary: None = None


class ResponseStreamOptions(Record):
    """What a stream carries besides the answer."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Choosing, kw_only=True):
    """The body of a response."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    reasoning: Reasoning | None = None
    reasoning_budget: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=1024)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    stream_options: ResponseStreamOptions | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
