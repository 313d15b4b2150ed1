"""The model as the endpoints see it: jobs in, events of their answers out; knows nothing of HTTP."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ParamSpec, Self, TypeVar

from gptoss_lite import __version__
from gptoss_lite.async_engine import AsyncEngine
from gptoss_lite.constrain import GrammarCompiler
from gptoss_lite.engine import Engine, Request
from gptoss_lite.errors import RequestError
from gptoss_lite.repetition import RepetitionWatch
from gptoss_lite.serve.errors import ApiError
from gptoss_lite.serve.metrics import ABANDONED, Metrics
from gptoss_lite.serve.recall import Recall
from gptoss_lite.serve.settings import Settings
from gptoss_lite.stream import EventStream, GenerationEvent, Usage
from gptoss_lite.tokenizer import Tokenizer

Events = list[tuple[int, GenerationEvent]]  # each with the index of its answer
P = ParamSpec("P")
Result = TypeVar("Result")
_BUSY = 503
_READERS = 4
_COMPILERS = 2
_LONGEST_RETRY = 60  # seconds


@dataclass(frozen=True, slots=True)
class Job:
    """What one API request asks for: answers, `choices` in a row to each prompt, and what reads their tokens.

    salt: tells apart who may share what is cached; remember: the answers are turns that may come back.
    """

    requests: Sequence[Request]
    streams: Sequence[EventStream]
    choices: int = 1
    salt: bytes = b""
    stop_on_repetition: bool = False
    remember: bool = False


@dataclass(slots=True)
class Account:
    """What a request came to, for its log line."""

    usage: Usage | None = None
    finish_reasons: list[str] = field(default_factory=list)
    first_token_seconds: float | None = None


class Answer:
    """One job under way: iterate over it for its events, until every answer has finished.

    `close` frees whatever is still under way. Raises what makes an answer fail.
    """

    def __init__(self, service: "Service", job: Job) -> None:
        self.account = Account()
        self.abandoned = False
        self._service = service
        self._job = job
        self._unfinished = set(range(len(job.requests)))
        self._usages: dict[int, Usage] = {}
        self._watches = [RepetitionWatch() for _ in job.requests] if job.stop_on_repetition else None
        self._begun = time.perf_counter()
        self._first: dict[int, float] = {}
        self._run = service.engine.run(job.requests)
        self._run.__enter__()
        limit = service.settings.max_seconds
        self._limit = limit and asyncio.get_running_loop().call_later(limit, self.cut)

    @property
    def usage(self) -> Usage:
        """The tokens of all answers; a prompt counts once, however many answers it has."""
        usages = [self._usages[i] for i in sorted(self._usages)]
        prompts = usages[:: self._job.choices]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
            seed=usages[0].seed,
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        try:
            arrived = await anext(self._run)
        except StopAsyncIteration:
            if not self._unfinished:
                raise
            return [(i, self._end(i, self._job.streams[i].cut())) for i in sorted(self._unfinished)]
        events = []
        for index, token_event in arrived:
            if index in self._unfinished:
                event = self._job.streams[index].accept(token_event)
                if index not in self._first:
                    self._note_first(index)
                if event.finish_reason is None and self._repeats(index, event.token):
                    event = self._cut_after(index, event)
                events.append((index, event if event.finish_reason is None else self._end(index, event)))
        return events

    def cut(self) -> None:
        """End what is unfinished where it stands, as if at its `max_tokens`."""
        for index in self._unfinished:
            self._run.cancel(index)

    def abandon(self) -> None:
        """Stop for good, without another event: nobody is there to read it."""
        self.cut()
        for _ in self._unfinished:
            self.abandoned = True
            self._service.metrics.abandoned()
            self.account.finish_reasons.append(ABANDONED)
        self._unfinished.clear()

    def close(self) -> None:
        """Free what is still under way; the service forgets the answer."""
        if self._limit:
            self._limit.cancel()
        self._run.__exit__(None, None, None)
        self._service.leave(self, len(self._job.requests), time.perf_counter() - self._begun)

    def _note_first(self, index: int) -> None:
        self._first[index] = time.perf_counter()
        seconds = self._first[index] - self._begun
        self._service.metrics.first_token(seconds)
        if self.account.first_token_seconds is None:
            self.account.first_token_seconds = seconds

    def _repeats(self, index: int, token: int) -> bool:
        return self._watches is not None and self._watches[index].feed(token)

    def _cut_after(self, index: int, event: GenerationEvent) -> GenerationEvent:
        """Let an event be the last of its answer."""
        last = self._job.streams[index].cut()
        return replace(last, text=event.text + last.text)

    def _end(self, index: int, event: GenerationEvent) -> GenerationEvent:
        assert event.usage is not None and event.finish_reason is not None
        self._unfinished.discard(index)
        self._run.cancel(index)
        self._usages[index] = event.usage
        now = time.perf_counter()
        first = self._first.get(index, now)
        self._service.metrics.finished(event.finish_reason, event.usage, now - first)
        if self._job.remember and event.finish_reason in ("stop", "tool_calls"):
            self._service.recall.remember(event.messages, self._job.salt)
        self.account.finish_reasons.append(event.finish_reason)
        if not self._unfinished:
            self.account.usage = self.usage
        return event


class Service:
    """One model, its engine, and who is waiting for it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.model = engine.model
        self.context = engine.context
        self.metrics = Metrics(engine)
        self.recall = Recall()
        self.engine = AsyncEngine(engine)
        self.fingerprint = f"gptoss-lite-{__version__}-{engine.model.ops.name}"
        self._readers = ThreadPoolExecutor(_READERS, "gptoss-lite reading")
        self._compilers = ThreadPoolExecutor(_COMPILERS, "gptoss-lite grammars")
        self.draining = False
        self._places = engine.max_sequences
        self._taken = 0
        self._answers: set[Answer] = set()
        self._durations: deque[float] = deque([1.0], maxlen=32)

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered now."""
        return self.engine.alive and not self.draining

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """What compiles schemas; made when the first is to be followed, which takes a second."""
        return GrammarCompiler(self.tokenizer)

    async def read(self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Call what reads a request in a thread: a long prompt must not hold up the answers of others."""
        return await _call_in(self._readers, function, *args, **kwargs)

    async def compile(self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Call what compiles schemas in a thread of another kind, for some take seconds."""
        return await _call_in(self._compilers, function, *args, **kwargs)

    def check_model(self, name: str) -> None:
        """Raise ApiError, status 404, for a model that is not served here."""
        if name != self.settings.model:
            raise ApiError(
                f"model is {name[:100]!r}: this server has {self.settings.model!r}",
                404,
                param="model",
                code="model_not_found",
            )

    def check_prompt(self, tokens: Sequence[int], field_name: str) -> None:
        """Raise ApiError for a prompt that the model cannot take or that leaves no room for an answer."""
        if len(tokens) >= self.context:
            raise ApiError(
                f"{field_name} has {len(tokens)} tokens, and the model's context is {self.context} tokens, "
                "the answer included: send less",
                param=field_name,
                code="context_length_exceeded",
            )
        try:
            self.model.check_prompt(tokens)
        except RequestError as error:
            raise ApiError(f"{field_name}: {error}", param=field_name) from None

    def begin(self, job: Job) -> Answer:
        """Put a job into the queue; ApiError where the server is full or closing."""
        if not self.healthy:
            raise ApiError("the server is shutting down", _BUSY, headers={"Retry-After": "5"})
        wanted, room = len(job.requests), self._places + self.settings.max_waiting
        if wanted > room:
            raise ApiError(
                f"{wanted} answers are more than this server takes at once, {room}: ask for fewer",
                param="n" if job.choices > 1 else "prompt",
            )
        if self._taken + wanted > room:
            raise ApiError(
                f"the server is busy: {self._taken} answers are under way or waiting",
                429,
                code="queue_full",
                headers={"Retry-After": str(self._retry_seconds())},
            )
        answer = Answer(self, job)
        self._taken += wanted
        self._answers.add(answer)
        return answer

    def leave(self, answer: Answer, places: int, seconds: float) -> None:
        """Give back what an answer held."""
        if answer in self._answers:
            self._answers.remove(answer)
            self._taken -= places
            self._durations.append(seconds)
            self.metrics.answered(seconds)

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self.draining = True

    def cut(self) -> None:
        """End all answers where they stand."""
        for answer in list(self._answers):
            answer.cut()

    def close(self) -> None:
        """Stop computing."""
        self.draining = True
        for threads in (self._readers, self._compilers):
            threads.shutdown(cancel_futures=True)
        self.engine.close()

    def _retry_seconds(self) -> int:
        """Guess when a place will be free: answers end one by one, each place's in about the mean time."""
        mean = sum(self._durations) / len(self._durations)
        return min(_LONGEST_RETRY, max(1, math.ceil(mean / self._places)))


async def _call_in(
    threads: ThreadPoolExecutor, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
) -> Result:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(threads, partial(function, *args, **kwargs))
