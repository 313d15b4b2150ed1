"""A chat turn in one form, whichever API it was asked through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


def chat_job(
    service: Service,
    turn: Turn,
    choosing: Choosing,
    *,
    choices: int = 1,
    max_tokens: int | None,
    logprobs: int | None,
    salt: bytes,
) -> Job:
    """Make a chat turn a job; raises RequestError and ApiError, naming the field that is wrong."""
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
    tokenizer = service.tokenizer
    tokens = render_prompt(conversation, tokenizer)
    service.check_prompt(tokens, turn.field)
    return make_job(
        tokenizer,
        [tokens],
        choosing,
        lambda: TurnReader(tokenizer, choosing.stops),
        choices=choices,
        max_tokens=max_tokens,
        logprobs=logprobs,
        salt=salt,
        constrain=None,
        remember=True,
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
