"""/v1/completions: plain text, or token ids, gone on with as they stand."""

import codecs
import time
import uuid
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gptoss_lite.errors import RequestError
from gptoss_lite.serve.fields import MOST_LOGPROBS, CompletionFields
from gptoss_lite.serve.jobs import make_job
from gptoss_lite.serve.logprobs import ContentLogprobs
from gptoss_lite.serve.replies import UsageReply, usage_reply
from gptoss_lite.serve.responding import DONE, data
from gptoss_lite.serve.service import Answer, Events, Job, Service
from gptoss_lite.serve.wire import Reply, decode
from gptoss_lite.stream import CompletionReader, GenerationEvent

MOST_PROMPTS = 128
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class CompletionRequest(CompletionFields, kw_only=True):
    """The body of a plain completion: one prompt or several, as text or token ids."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class CompletionLogprobs(Reply, omit_defaults=False):
    """Tokens of the text, their log-probabilities, and where in the text each begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Reply, omit_defaults=False):
    """One text, or more of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(Reply, omit_defaults=False):
    """All texts, or what has come of them since the last chunk."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: UsageReply | UnsetType | None = UNSET


_decoder = msgspec.json.Decoder(CompletionRequest)


async def read(body: bytes, service: Service, salt: bytes) -> tuple[Job, "CompletionView", bool]:
    """Read a request: the job, how to answer, and if as a stream; RequestError, ApiError name a field."""
    return await service.read(_read, body, service, salt)


def _read(body: bytes, service: Service, salt: bytes) -> tuple[Job, "CompletionView", bool]:
    request = decode(body, _decoder)
    service.check_model(request.model)
    request.check_stream_options()
    if request.echo and request.logprobs is not None:
        raise RequestError("echo with logprobs is not supported: a prompt's tokens have no log-probabilities")
    prompts = [_tokens(prompt, service) for prompt in _prompts(request.prompt)]
    for i, tokens in enumerate(prompts):
        service.check_prompt(tokens, "prompt" if len(prompts) == 1 else f"prompt[{i}]")
    job = make_job(
        service.tokenizer,
        prompts,
        request,
        lambda: CompletionReader(service.tokenizer, request.stops),
        choices=request.n or 1,
        max_tokens=request.max_tokens,
        logprobs=request.logprobs,
        salt=salt,
    )
    echoes = [service.tokenizer.decode(r.tokens) if request.echo else "" for r in job.requests]
    return job, CompletionView(service, request, echoes), bool(request.stream)


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Tell one prompt of token ids from several prompts."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    several = [item for item in prompt if not isinstance(item, int)]
    if ids and several:
        raise RequestError("prompt has both token ids and whole prompts: give a list of one kind")
    if not prompt:
        raise RequestError("prompt is empty: give a text or token ids")
    if len(several) > MOST_PROMPTS:
        raise RequestError(f"prompt has {len(several)} prompts: give at most {MOST_PROMPTS}")
    return [ids] if ids else several


def _tokens(prompt: str | list[int], service: Service) -> list[int]:
    return service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


class CompletionView:
    """Texts as plain completions have them: in chunks, or whole."""

    def __init__(self, service: Service, request: CompletionRequest, echoes: list[str]) -> None:
        self._request = request
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": service.fingerprint,
        }
        wants = request.logprobs is not None
        self._answers = [
            _Answer(i, echo, ContentLogprobs(service.tokenizer) if wants else None)
            for i, echo in enumerate(echoes)
        ]

    def feed(self, events: Events) -> bytes:
        """See View."""
        told = [choice for index, event in events if (choice := self._answers[index].feed(event))]
        return b"".join(data(self._completion([choice])) for choice in told) if self._request.stream else b""

    def finish(self, answer: Answer) -> bytes:
        """See View."""
        if not self._request.includes_usage:
            return DONE
        return data(self._completion([], usage_reply(answer.usage))) + DONE

    def body(self, answer: Answer) -> Completion:
        """See View."""
        choices = [one.whole() for one in self._answers]
        return Completion(**self._head, choices=choices, usage=usage_reply(answer.usage))

    def failed(self, error: dict[str, Any]) -> bytes:
        """See View."""
        return data(error) + DONE

    def _completion(self, choices: list[CompletionChoice], usage: UsageReply | None = None) -> Completion:
        shown = usage if self._request.includes_usage else UNSET
        return Completion(**self._head, choices=choices, usage=shown)


class _Answer:
    """One of a request's texts, and what has come of it."""

    def __init__(self, index: int, echo: str, logprobs: ContentLogprobs | None) -> None:
        self._index = index
        self._echo = echo  # stands before the first text
        self._logprobs = logprobs
        self._offset = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._parts: list[CompletionChoice] = []

    def feed(self, event: GenerationEvent) -> CompletionChoice | None:
        """Take an event; return what it adds, None if that is nothing."""
        logprobs = None if self._logprobs is None else self._entries(self._logprobs, event)
        if (
            not event.text
            and not self._echo
            and event.finish_reason is None
            and not (logprobs and logprobs.tokens)
        ):
            return None
        part = CompletionChoice(
            index=self._index,
            text=self._echo + event.text,
            logprobs=logprobs,
            finish_reason=event.finish_reason,
        )
        self._echo = ""
        self._parts.append(part)
        return part

    def _entries(self, logprobs: ContentLogprobs, event: GenerationEvent) -> CompletionLogprobs:
        shown = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in logprobs.feed(event):
            shown.tokens.append(entry.token)
            shown.token_logprobs.append(entry.logprob)
            shown.top_logprobs.append({top.token: top.logprob for top in entry.top_logprobs})
            shown.text_offset.append(self._offset)
            self._offset += len(self._utf8.decode(bytes(entry.bytes)))  # a character may take several tokens
        return shown

    def whole(self) -> CompletionChoice:
        """Put everything that has come together."""
        parts = [part.logprobs for part in self._parts if part.logprobs is not None]
        logprobs = CompletionLogprobs(
            tokens=[token for part in parts for token in part.tokens],
            token_logprobs=[value for part in parts for value in part.token_logprobs],
            top_logprobs=[top for part in parts for top in part.top_logprobs],
            text_offset=[offset for part in parts for offset in part.text_offset],
        )
        return CompletionChoice(
            index=self._index,
            text="".join(part.text for part in self._parts),
            logprobs=None if self._logprobs is None else logprobs,
            finish_reason=self._parts[-1].finish_reason,
        )
