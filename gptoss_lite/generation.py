"""The public surface, after mlx-lm: load a model, then generate text from a prompt or a chat."""

import datetime
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping, Sequence
from contextlib import aclosing
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from gptoss_lite import hub
from gptoss_lite.checkpoint import Checkpoint, open_checkpoint
from gptoss_lite.engine import Engine, Request
from gptoss_lite.errors import RequestError
from gptoss_lite.harmony import Message, from_chat, render_prompt
from gptoss_lite.harmony.parse import turn_ends
from gptoss_lite.memory import Plan
from gptoss_lite.model import GptOss, Progress
from gptoss_lite.ops import get_ops
from gptoss_lite.sampling import SamplingParams
from gptoss_lite.stream import CompletionReader, EventStream, GenerationEvent, Reader, TurnReader
from gptoss_lite.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gptoss_lite.async_engine import AsyncEngine

__all__ = [
    "GenerateOptions",
    "GenerationEvent",
    "async_stream_generate",
    "batch_generate",
    "generate",
    "load",
    "load_model",
    "stream_generate",
]

Prompt = str | Sequence[int]
Chat = Sequence[Mapping[str, Any] | Message]
_CHAT_OPTIONS = ("reasoning_effort", "instructions", "tools", "response_format", "date")


class GenerateOptions(TypedDict, total=False):
    """How to answer; each may be left out.

    max_tokens: the most tokens to generate, reasoning included; None goes up to the model's context.
    sampling: how tokens are chosen. stop: strings that end the answer and are not part of it.
    stop_token_ids: the same for tokens.

    For a chat alone: reasoning_effort: "low", "medium" or "high". instructions: what the developer wants of
    the model. tools: functions as OpenAI's API spells them. response_format: likewise. date: today's by
    default, "YYYY-MM-DD" or a date.
    """

    max_tokens: int | None
    sampling: SamplingParams
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    reasoning_effort: str
    instructions: str | None
    tools: Sequence[Mapping[str, Any]] | None
    response_format: Mapping[str, Any] | None
    date: str | datetime.date | None


class LoadOptions(TypedDict, total=False):
    """How to load; each may be left out.

    threads: CPU threads, one a core by default. activations: what packed weights are multiplied by on a CPU,
    "accurate", the default, 16 bits, or "int8". dense: "int8" quantises attention and lm_head while loading,
    on a CPU, where the checkpoint has them dense. device_memory: the most bytes of a GPU's memory to take, by
    default what is free; where the model does not fit in it, experts stay in host memory. cache_tokens: how
    many tokens' keys and values to have room for, one model context by default. progress: called with the
    bytes read and the bytes in all. planned: called, before anything is read, with what will lie where on a
    GPU.
    """

    threads: int | None
    activations: Literal["accurate", "int8"] | None
    dense: Literal["int8"] | None
    device_memory: int | None
    cache_tokens: int | None
    progress: Progress | None
    planned: Callable[[Plan], None] | None


def load(
    path: str | os.PathLike[str],
    device: str = "auto",
    **options: Unpack[LoadOptions],
) -> tuple[GptOss, Tokenizer]:
    """Load a checkpoint directory, or a model by its name; weights stay packed.

    A name is "demo", the bundled model; "20b" or "120b", OpenAI's own; or `org/name` on the Hugging Face hub,
    perhaps with `@revision`, which is downloaded once and takes the extra `hub`.
    device: "auto", "cpu", "cuda", "cuda:1" and so on, "reference", or "emulated", the GPU's kernels on a CPU.
    Raises CheckpointError for a damaged or foreign checkpoint, DeviceError for a device that is not there,
    OutOfMemoryError, before anything is read, for a GPU with too little memory.
    """
    checkpoint = _open(path)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
    return _load(checkpoint, device, options), tokenizer


def load_model(
    path: str | os.PathLike[str],
    device: str = "auto",
    **options: Unpack[LoadOptions],
) -> GptOss:
    """Load as `load` does, for work on token ids: no tokenizer is needed."""
    return _load(_open(path), device, options)


def stream_generate(
    model: GptOss,
    tokenizer: Tokenizer,
    prompt: Prompt | None = None,
    *,
    messages: Chat | None = None,
    engine: Engine | None = None,
    prompt_progress: Progress | None = None,
    **options: Unpack[GenerateOptions],
) -> Generator[GenerationEvent, None, None]:
    """Generate token by token: go on from `prompt`, or answer the chat `messages` as the assistant.

    prompt: text or token ids, continued as it stands. messages: dictionaries as OpenAI's API spells them, or
    the messages of an earlier turn's last event. engine: one made with Engine(model) and kept between calls
    reuses the cached beginning of the prompt; it must have no other request under way.
    prompt_progress: called with the tokens of the prompt computed and their number, until the answer begins.
    Closing the iterator cancels. Raises RequestError for what cannot be served.
    """
    if engine is None:
        engine = Engine(model)
    elif engine.model is not model:
        raise RequestError("the engine has another model: make one with Engine(model)")
    request, stream = _prepare(tokenizer, prompt, messages, options)
    return _stream(engine, request, stream, prompt_progress)


def generate(
    model: GptOss,
    tokenizer: Tokenizer,
    prompt: Prompt | None = None,
    *,
    messages: Chat | None = None,
    engine: Engine | None = None,
    **options: Unpack[GenerateOptions],
) -> str:
    """Generate as stream_generate does; return the text for the user, without reasoning and tool calls."""
    events = stream_generate(model, tokenizer, prompt, messages=messages, engine=engine, **options)
    return "".join(event.text for event in events if event.is_content)


def batch_generate(
    model: GptOss,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt] | None = None,
    *,
    messages: Sequence[Chat] | None = None,
    **options: Unpack[GenerateOptions],
) -> list[str]:
    """Generate from several prompts, or answer several chats, in shared batches; texts in the given order."""
    if (prompts is None) == (messages is None):
        raise RequestError("give either prompts or messages")
    if isinstance(prompts, str):
        raise RequestError("prompts is one text: give a list")
    prepared = [
        *(_prepare(tokenizer, prompt, None, options) for prompt in prompts or ()),
        *(_prepare(tokenizer, None, chat, options) for chat in messages or ()),
    ]
    engine = Engine(model)
    streams = {engine.submit(request): stream for request, stream in prepared}
    texts = dict.fromkeys(streams, "")
    while engine.has_work:
        for token_event in engine.step():
            event = streams[token_event.request_id].accept(token_event)
            if event.is_content:
                texts[token_event.request_id] += event.text
            if event.finish_reason is not None:
                engine.cancel(token_event.request_id)
    return list(texts.values())


async def async_stream_generate(
    engine: "AsyncEngine",
    tokenizer: Tokenizer,
    prompt: Prompt | None = None,
    *,
    messages: Chat | None = None,
    **options: Unpack[GenerateOptions],
) -> AsyncGenerator[GenerationEvent, None]:
    """Generate as stream_generate does, beside other tasks that share the engine and its batches."""
    request, stream = _prepare(tokenizer, prompt, messages, options)
    async with aclosing(engine.stream(request)) as token_events:
        async for token_event in token_events:
            event = stream.accept(token_event)
            yield event
            if event.finish_reason is not None:
                return


def _load(checkpoint: Checkpoint, device: str, options: LoadOptions) -> GptOss:
    if unknown := options.keys() - LoadOptions.__annotations__.keys():
        raise TypeError(f"no option {min(unknown)!r}: there are {', '.join(LoadOptions.__annotations__)}")
    for name in ("device_memory", "cache_tokens"):
        value = options.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise RequestError(f"{name} is {value!r}: give an integer of at least 1, or None")
    ops = get_ops(
        device,
        options.get("threads"),
        options.get("device_memory"),
        options.get("activations"),
        options.get("dense"),
    )
    return GptOss(
        checkpoint,
        ops,
        options.get("progress"),
        cache_tokens=options.get("cache_tokens"),
        planned=options.get("planned"),
    )


def _open(path: str | os.PathLike[str]) -> Checkpoint:
    return open_checkpoint(hub.resolve(path))


def _stream(
    engine: Engine, request: Request, stream: EventStream, prompt_progress: Progress | None
) -> Generator[GenerationEvent, None, None]:
    if engine.has_work:
        raise RequestError("the engine has a request under way: finish or close that stream first")
    request_id = engine.submit(request)
    try:
        while True:
            token_events = engine.step()
            if prompt_progress is not None:
                total = len(request.tokens)
                prompt_progress(total if token_events else engine.computed(request_id), total)
                prompt_progress = None if token_events else prompt_progress
            for token_event in token_events:
                event = stream.accept(token_event)
                yield event
                if event.finish_reason is not None:
                    return
    finally:
        engine.cancel(request_id)


def _prepare(
    tokenizer: Tokenizer, prompt: Prompt | None, messages: Chat | None, options: GenerateOptions
) -> tuple[Request, EventStream]:
    """Make the engine's request of a prompt or a chat, and what turns its tokens into events."""
    if unknown := options.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"no option {min(unknown)!r}: there are {', '.join(GenerateOptions.__annotations__)}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    chat_options = {name: given[name] for name in _CHAT_OPTIONS if name in given}
    stops = given.get("stop", ())
    reader: Reader
    if prompt is not None and messages is None:
        if chat_options:
            raise RequestError(f"{next(iter(chat_options))} is for a chat: give messages, not a prompt")
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        reader = CompletionReader(tokenizer, stops)
    elif messages is not None and prompt is None:
        if not messages:
            raise RequestError("messages is empty: give at least one")
        tokens = render_prompt(from_chat(messages, **chat_options), tokenizer)
        reader = TurnReader(tokenizer, stops)
    else:
        raise RequestError("give either a prompt or messages")
    sampling = given.get("sampling", SamplingParams())
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling is {sampling!r}: give SamplingParams(...)")
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    ends = turn_ends(tokenizer)
    own_stops = given.get("stop_token_ids", ())
    if not isinstance(own_stops, Collection) or not all(isinstance(i, Integral) for i in own_stops):
        raise RequestError(f"stop_token_ids is {own_stops!r}: give a list of token ids")
    hidden = frozenset(own_stops) - ends
    request = Request(tokens, sampling, seed, given.get("max_tokens"), ends | hidden)
    return request, EventStream(reader, seed, len(request.tokens), hidden)
