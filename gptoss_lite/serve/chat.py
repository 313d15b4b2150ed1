"""/v1/chat/completions: a conversation in, the assistant's next message out."""

import time
import uuid
from typing import Any

import msgspec

from gptoss_lite.errors import RequestError
from gptoss_lite.harmony.chat import call_name
from gptoss_lite.serve.chat_types import AllowedToolsChoice, ChatRequest, NamedTool
from gptoss_lite.serve.logprobs import ContentLogprobs
from gptoss_lite.serve.recall import assistant_message
from gptoss_lite.serve.replies import (
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    Chunk,
    ChunkChoice,
    Delta,
    FunctionDelta,
    TokenLogprob,
    ToolCallDelta,
    UsageReply,
    usage_reply,
)
from gptoss_lite.serve.responding import DONE, data
from gptoss_lite.serve.service import Answer, Events, Job, Service
from gptoss_lite.serve.turn import ToolChoice, Turn, chat_job, prompt_of
from gptoss_lite.serve.wire import builtin, decode
from gptoss_lite.stream import ANALYSIS, GenerationEvent

_decoder = msgspec.json.Decoder(ChatRequest)


async def read(body: bytes, service: Service, salt: bytes) -> tuple[Job, "ChatView", bool]:
    """Read a request: the job, how to answer, and if as a stream; RequestError, ApiError name a field."""
    request, turn, tokens = await service.read(_read, body, service, salt)
    job = await chat_job(
        service,
        turn,
        tokens,
        request,
        choices=request.n or 1,
        max_tokens=_max_tokens(request),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        salt=salt,
    )
    return job, ChatView(service, request, len(job.requests)), bool(request.stream)


def _read(body: bytes, service: Service, salt: bytes) -> tuple[ChatRequest, Turn, list[int]]:
    request = decode(body, _decoder)
    service.check_model(request.model)
    request.check_stream_options()
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs is for logprobs: set logprobs to true")
    turn = _turn(request)
    return request, turn, prompt_of(turn, service, salt)


def _max_tokens(request: ChatRequest) -> int | None:
    """Return the limit, whichever of its two names it came under."""
    given = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(given) > 1:
        raise RequestError("max_tokens and max_completion_tokens are the same limit, and differ: give one")
    return given.pop() if given else None


def _turn(request: ChatRequest) -> Turn:
    return Turn(
        "messages",
        builtin(request.messages),
        "medium" if request.reasoning_effort is None else request.reasoning_effort,
        tools=builtin(request.tools or []),
        tool_choice=_tool_choice(request),
        response_format=builtin(request.response_format),
        reasoning_budget=request.reasoning_budget,
    )


def _tool_choice(request: ChatRequest) -> ToolChoice:
    match request.tool_choice:
        case None:
            return ToolChoice()
        case NamedTool(function=function):
            return ToolChoice("required", frozenset([function.name]))
        case AllowedToolsChoice(allowed_tools=allowed):
            return ToolChoice(allowed.mode, frozenset(tool.function.name for tool in allowed.tools))
        case mode:
            return ToolChoice(mode)


class ChatView:
    """Answers as chat completions have them: in chunks, or whole."""

    def __init__(self, service: Service, request: ChatRequest, answers: int) -> None:
        self._request = request
        self._mirror = service.settings.reasoning_content
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": service.fingerprint,
        }
        wants = request.logprobs
        self._answers = [
            _Answer(i, self._mirror, ContentLogprobs(service.tokenizer) if wants else None)
            for i in range(answers)
        ]
        self._streams = bool(request.stream)

    def feed(self, events: Events) -> bytes:
        """See View."""
        if not self._streams:
            for index, event in events:
                self._answers[index].note(event)
            return b""
        choices = [choice for index, event in events for choice in self._answers[index].feed(event)]
        # a chunk each, as clients know them, in one write
        return b"".join(data(self._chunk([choice])) for choice in choices)

    def finish(self, answer: Answer) -> bytes:
        """See View."""
        if not self._request.includes_usage:
            return DONE
        return data(self._chunk([], usage_reply(answer.usage))) + DONE

    def body(self, answer: Answer) -> ChatCompletion:
        """See View."""
        choices = [one.whole() for one in self._answers]
        return ChatCompletion(**self._head, choices=choices, usage=usage_reply(answer.usage))

    def failed(self, error: dict[str, Any]) -> bytes:
        """See View."""
        return data(error) + DONE

    def _chunk(self, choices: list[ChunkChoice], usage: UsageReply | None = None) -> Chunk:
        shown = usage if self._request.includes_usage else msgspec.UNSET
        return Chunk(**self._head, choices=choices, usage=shown)


class _Answer:
    """One of a request's answers: what has been told of it."""

    def __init__(self, index: int, mirror: bool, logprobs: ContentLogprobs | None) -> None:
        self._index = index
        self._mirror = mirror
        self._logprobs = logprobs
        self._entries: list[TokenLogprob] = []  # when it is no stream
        self._last: GenerationEvent | None = None
        self._call_ids: dict[int, str] = {}  # by the call's place among the turn's messages
        self._begun = False

    def note(self, event: GenerationEvent) -> None:
        """Take an event of an answer that is shown as a whole."""
        self._entries += self._new_entries(event)
        self._last = event

    def whole(self) -> Choice:
        """Return the answer, of which the last event has all messages."""
        assert self._last is not None and self._last.finish_reason is not None
        messages = self._last.messages
        message = assistant_message(messages, {i: _call_id() for i in range(len(messages))})
        message["refusal"] = None
        if self._mirror and "reasoning" in message:
            message["reasoning_content"] = message["reasoning"]
        logprobs = None if self._logprobs is None else ChoiceLogprobs(content=self._entries)
        return Choice(
            index=self._index, message=message, logprobs=logprobs, finish_reason=self._last.finish_reason
        )

    def feed(self, event: GenerationEvent) -> list[ChunkChoice]:
        """Take an event of a stream; return what to tell of it, often nothing."""
        entries = self._new_entries(event)
        delta = self._delta(event)
        told = []
        if delta is not None or entries:
            logprobs = ChoiceLogprobs(content=entries) if entries else None
            told.append(ChunkChoice(index=self._index, delta=delta or Delta(), logprobs=logprobs))
        if not self._begun and (told or event.finish_reason is not None):
            self._begun = True
            told.insert(0, ChunkChoice(index=self._index, delta=Delta(role="assistant", content="")))
        if event.finish_reason is not None:
            told.append(ChunkChoice(index=self._index, delta=Delta(), finish_reason=event.finish_reason))
        return told

    def _new_entries(self, event: GenerationEvent) -> list[TokenLogprob]:
        if self._logprobs is None or event.message is None or not event.is_content:
            return []
        return self._logprobs.feed(event)

    def _delta(self, event: GenerationEvent) -> Delta | None:
        if event.is_call:
            return self._call_delta(event)
        if not event.text:
            return None
        if event.channel != ANALYSIS:
            return Delta(content=event.text)
        return Delta(reasoning=event.text, reasoning_content=event.text if self._mirror else None)

    def _call_delta(self, event: GenerationEvent) -> Delta | None:
        if event.message is None:  # still in the header
            return None
        if event.message in self._call_ids:
            if not event.text:
                return None
            place = list(self._call_ids).index(event.message)
            function = FunctionDelta(arguments=event.text)
            return Delta(tool_calls=[ToolCallDelta(index=place, function=function)])
        call_id = self._call_ids[event.message] = _call_id()
        function = FunctionDelta(name=call_name(event.recipient), arguments=event.text)
        place = len(self._call_ids) - 1
        return Delta(tool_calls=[ToolCallDelta(index=place, id=call_id, type="function", function=function)])


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
