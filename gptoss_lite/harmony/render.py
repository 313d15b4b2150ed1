"""Harmony messages to tokens; every piece of text is encoded as ordinary text, on its own.

So nothing a user, a tool or a description says can become a special token.
"""

from collections.abc import Iterator, Sequence

from gptoss_lite.errors import RequestError
from gptoss_lite.harmony.messages import (
    Content,
    DeveloperContent,
    Message,
    Namespace,
    ResponseFormat,
    Role,
    SystemContent,
    Tool,
)
from gptoss_lite.harmony.typescript import compact_json, to_typescript
from gptoss_lite.tokenizer import Tokenizer

CONSTRAIN = "<|constrain|>"
FUNCTIONS = "functions"


def render_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    next_role: Role = "assistant",
    drop_analysis: bool = True,
) -> list[int]:
    """Return the tokens of a conversation and the opening of the next turn.

    With `drop_analysis` the analysis before the last final answer is left out, as it was in training;
    that of a tool loop still running stays. RequestError for a message that has no harmony form.
    """
    tokens = render_messages(messages, tokenizer, drop_analysis=drop_analysis)
    return [*tokens, *opening(next_role, tokenizer)]


def render_training(
    messages: Sequence[Message], tokenizer: Tokenizer, *, drop_analysis: bool = True
) -> list[int]:
    """Return the tokens of a conversation in training form, where a last final ends in ``<|return|>``."""
    tokens = render_messages(messages, tokenizer, drop_analysis=drop_analysis)
    if messages and messages[-1].role == "assistant" and messages[-1].channel == "final":
        tokens[-1] = tokenizer.special["<|return|>"]
    return tokens


def render_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, *, drop_analysis: bool = True
) -> list[int]:
    """Return the tokens of a conversation without the opening of a next turn."""
    has_functions = any(
        namespace.name == FUNCTIONS and namespace.tools
        for message in messages
        for part in message.content
        if isinstance(part, DeveloperContent)
        for namespace in part.tools
    )
    kept = without_old_analysis(messages) if drop_analysis else messages
    return [token for message in kept for token in _render_message(message, tokenizer, has_functions)]


def without_old_analysis(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without the analysis that stands before the last final answer of the assistant."""
    finals = [i for i, m in enumerate(messages) if m.role == "assistant" and m.channel == "final"]
    last_final = finals[-1] if finals else 0
    return [m for i, m in enumerate(messages) if i >= last_final or m.channel != "analysis"]


def opening(role: Role, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that open a turn, after which the model begins to write."""
    return [tokenizer.special["<|start|>"], *tokenizer.encode(role)]


def _render_message(message: Message, tokenizer: Tokenizer, has_functions: bool) -> Iterator[int]:
    if message.tokens is not None:
        yield from message.tokens
        return
    special, encode = tokenizer.special, tokenizer.encode
    yield special["<|start|>"]
    if message.role == "tool":
        if not message.name:
            raise RequestError("a tool message has no name: give that of the tool that answers")
        yield from encode(message.name)
    else:
        yield from encode(message.role)
        if message.name is not None:
            yield from encode(f":{message.name}")
    if message.recipient not in (None, "all"):
        yield from encode(f" to={message.recipient}")
    if message.channel is not None:
        yield special["<|channel|>"]
        yield from encode(message.channel)
    if message.content_type is not None:
        head, constrain, rest = message.content_type.partition(CONSTRAIN)
        if constrain and not head:
            yield from [*encode(" "), special[CONSTRAIN], *encode(rest)]
        else:
            yield from encode(f" {message.content_type}")
    yield special["<|message|>"]
    for part in message.content:
        yield from encode(_part_text(part, message.role, has_functions))
    is_call = message.role == "assistant" and message.recipient is not None
    yield special["<|call|>" if is_call else "<|end|>"]


def _part_text(part: Content, role: Role, has_functions: bool) -> str:
    match part:
        case str():
            return part
        case SystemContent() if role == "system":
            return _system_text(part, has_functions)
        case DeveloperContent() if role == "developer":
            try:
                return _developer_text(part)
            except RecursionError as error:
                raise RequestError("the schema of a tool or response format is nested too deeply") from error
    raise RequestError(f"a {role} message holds a {type(part).__name__}, which has a role of its own")


def _system_text(system: SystemContent, has_functions: bool) -> str:
    top = [
        (system.model_identity, "{}"),
        (system.knowledge_cutoff, "Knowledge cutoff: {}"),
        (system.current_date, "Current date: {}"),
    ]
    sections = ["\n".join(form.format(value) for value, form in top if value is not None)]
    if system.reasoning_effort is not None:
        sections.append(f"Reasoning: {system.reasoning_effort}")
    if system.tools:
        sections.append(_tools_text(system.tools))
    if system.channels:
        line = f"# Valid channels: {', '.join(system.channels)}."
        if system.channel_required:
            line += " Channel must be included for every message."
        if has_functions:
            line += f"\nCalls to these tools must go to the commentary channel: '{FUNCTIONS}'."
        sections.append(line)
    return "\n\n".join(sections if any(value is not None for value, _ in top) else sections[1:])


def _developer_text(developer: DeveloperContent) -> str:
    sections = []
    if developer.instructions is not None:
        sections += ["# Instructions", developer.instructions]
    if developer.tools:
        sections.append(_tools_text(developer.tools))
    if developer.response_format is not None:
        sections.append(_response_format_text(developer.response_format))
    return "\n\n".join(sections)


def _response_format_text(form: ResponseFormat) -> str:
    comment = "".join(f"// {line}\n" for line in _lines(form.description or ""))
    return f"# Response Formats\n\n## {form.name}\n\n{comment}{compact_json(form.schema)}"


def _tools_text(namespaces: Sequence[Namespace]) -> str:
    ordered = sorted(namespaces, key=lambda namespace: namespace.name)
    return "\n\n".join(["# Tools", *map(_namespace_text, ordered)])


def _namespace_text(namespace: Namespace) -> str:
    comment = "// " if namespace.tools else ""
    lines = [f"## {namespace.name}\n"]
    lines += [f"{comment}{line}" for line in _lines(namespace.description or "")]
    if namespace.tools:
        lines.append(f"namespace {namespace.name} {{\n")
        lines += [line for tool in namespace.tools for line in _tool_lines(tool)]
        lines.append(f"}} // namespace {namespace.name}")
    return "\n".join(lines)


def _tool_lines(tool: Tool) -> list[str]:
    argument = "" if tool.parameters is None else f"_: {to_typescript(tool.parameters)}"
    comments = [f"// {line}" for line in _lines(tool.description)]
    return [*comments, f"type {tool.name} = ({argument}) => any;\n"]


def _lines(text: str) -> list[str]:
    """Split at line feeds alone, with or without a carriage return before; the last one ends the text."""
    *lines, rest = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + ([rest] if rest else [])
