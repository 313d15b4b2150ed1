"""A chat turn in one form, whichever API it was asked through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptoss_lite.constrain import TurnConstraint, TurnRules
from gptoss_lite.errors import RequestError
from gptoss_lite.harmony import from_chat, render_prompt
from gptoss_lite.serve.fields import Choosing
from gptoss_lite.serve.jobs import make_job
from gptoss_lite.serve.service import Job, Service
from gptoss_lite.stream import TurnReader


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools may, must or must not be called, and which: None means any that is offered."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation to go on with, in dictionaries as chat completions have them.

    reasoning_budget: most tokens of reasoning, None for no limit. field: what the API calls the messages.
    """

    field: str
    messages: Sequence[Mapping[str, Any]]
    reasoning_effort: str = "medium"
    instructions: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = ToolChoice()
    response_format: Mapping[str, Any] | None = None
    reasoning_budget: int | None = None


def prompt_of(turn: Turn, service: Service, salt: bytes) -> list[int]:
    """Render a turn, with what the model wrote before as it wrote it; RequestError, ApiError name a field."""
    _check_choice(turn)
    conversation = from_chat(
        turn.messages,
        reasoning_effort=turn.reasoning_effort,
        instructions=turn.instructions,
        tools=turn.tools,
        response_format=turn.response_format,
        date=service.settings.date,
        recall=lambda messages: service.recall.find(messages, salt),
    )
    tokens = render_prompt(conversation, service.tokenizer)
    service.check_prompt(tokens, turn.field)
    return tokens


async def chat_job(
    service: Service,
    turn: Turn,
    tokens: list[int],
    choosing: Choosing,
    *,
    choices: int = 1,
    max_tokens: int | None,
    logprobs: int | None,
    salt: bytes,
) -> Job:
    """Make a job of a turn and its prompt; raises RequestError, naming the field that is wrong."""
    tokenizer = service.tokenizer
    rules = await service.compile(turn_rules, turn, service) if _is_ruled(turn) else None
    return make_job(
        tokenizer,
        [tokens],
        choosing,
        lambda: TurnReader(tokenizer, choosing.stops),
        choices=choices,
        max_tokens=max_tokens,
        logprobs=logprobs,
        salt=salt,
        constrain=None if rules is None else lambda: TurnConstraint(rules, tokenizer, len(tokens)),
        remember=True,
    )


def turn_rules(turn: Turn, service: Service) -> TurnRules:
    """Say what an answer may consist of; compiles the schemas that are to be followed."""
    grammars, choice, form = service.grammars, turn.tool_choice, turn.response_format or {}
    content = None
    if form.get("type") == "json_object":
        content = grammars.json_object()
    elif form.get("type") == "json_schema":
        content = grammars.compile(form["json_schema"]["schema"], "response_format: the schema")
    forced = choice.mode == "required"
    calls = {}
    for function in (tool["function"] for tool in turn.tools):
        name = function["name"]
        if choice.mode == "none" or (choice.names is not None and name not in choice.names):
            continue
        calls[name] = grammars.json_object() if forced else None
        if function.get("strict"):
            schema = function.get("parameters") or {"type": "object", "additionalProperties": False}
            calls[name] = grammars.compile(schema, f"tools: the parameters of {name!r}")
    return TurnRules(content, calls, answer=not forced, reasoning_tokens=turn.reasoning_budget)


def _is_ruled(turn: Turn) -> bool:
    """Whether anything about an answer is not left to the model."""
    return (
        turn.tool_choice != ToolChoice()
        or turn.reasoning_budget is not None
        or (turn.response_format or {}).get("type") in ("json_object", "json_schema")
        or any(tool["function"].get("strict") for tool in turn.tools)
    )


def _check_choice(turn: Turn) -> None:
    offered = {tool["function"]["name"] for tool in turn.tools}
    choice = turn.tool_choice
    if choice.mode == "required" and not offered:
        raise RequestError("tool_choice asks for a call, and there are no tools: give some, or leave it out")
    if unknown := (choice.names or frozenset()) - offered:
        raise RequestError(f"tool_choice names {min(unknown)!r}, which is not among tools")
    if choice.names is not None and not choice.names:
        raise RequestError("tool_choice allows no tool: give at least one, or 'none'")
