"""From messages and prompts to text: the public functions over the bundled model."""

import asyncio
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import gptoss_lite as gl
from gptoss_lite.engine import TokenEvent
from gptoss_lite.harmony import Message
from gptoss_lite.model import GptOss
from gptoss_lite.stream import StopStrings
from gptoss_lite.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "Tell me about the sea."}]
GREEDY = gl.SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def demo() -> tuple[GptOss, Tokenizer]:
    return gl.load("demo", device="cpu")


class Script:
    """A logits processor that makes the model say chosen tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._rest = list(tokens)

    def __call__(self, tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        forced = np.full_like(logits, -np.inf)
        forced[self._rest.pop(0)] = 0
        return forced


def scripted(tokenizer: Tokenizer, *parts: str) -> gl.SamplingParams:
    """Say text parts and special tokens, the latter where a part is one's name."""
    tokens: list[int] = []
    for part in parts:
        tokens += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
    return gl.SamplingParams(temperature=0, logits_processors=(Script(tokens),))


TURN = (
    "<|channel|>", "analysis", "<|message|>", "They ask of the sea.", "<|end|>",
    "<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "The sea is wide, and deep.",
    "<|return|>",
)  # fmt: skip
CALL = ("<|channel|>", "commentary to=functions.look", "<|message|>", '{"at":"sea"}', "<|call|>")


def text_of(events: Iterable[gl.GenerationEvent], channel: str) -> str:
    return "".join(event.text for event in events if event.channel == channel)


def test_a_turn_streams_reasoning_then_content(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    events = list(gl.stream_generate(model, tokenizer, messages=ASK, sampling=scripted(tokenizer, *TURN)))
    assert text_of(events, "analysis") == "They ask of the sea."
    assert text_of(events, "final") == "The sea is wide, and deep."
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
    usage = events[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(events)
    reasoning = tokenizer.encode("They ask of the sea.")
    assert len(reasoning) <= usage.reasoning_tokens <= len(reasoning) + 2  # with <|message|> and <|end|>
    assert [(m.channel, m.text) for m in events[-1].messages] == [
        ("analysis", "They ask of the sea."),
        ("final", "The sea is wide, and deep."),
    ]


def test_generate_returns_what_is_meant_for_the_user(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    text = gl.generate(model, tokenizer, messages=ASK, sampling=scripted(tokenizer, *TURN))
    assert text == "The sea is wide, and deep."


def test_a_tool_call_is_named_and_kept_out_of_the_text(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    *_, last = events = list(
        gl.stream_generate(model, tokenizer, messages=ASK, tools=tools, sampling=scripted(tokenizer, *CALL))
    )
    assert last.finish_reason == "tool_calls"
    assert [(m.recipient, m.text) for m in last.messages] == [("functions.look", '{"at":"sea"}')]
    assert "".join(e.text for e in events if e.recipient == "functions.look") == '{"at":"sea"}'
    assert not any(event.text for event in events if event.is_content)


def test_a_message_to_all_is_for_the_user(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    say = scripted(tokenizer, "<|channel|>", "final to=all", "<|message|>", "Yes.", "<|return|>")
    *_, last = events = list(gl.stream_generate(model, tokenizer, messages=ASK, sampling=say))
    assert "".join(event.text for event in events if event.is_content) == "Yes."
    assert last.finish_reason == "stop"


def test_the_next_turn_finds_the_last_one_in_the_cache(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    engine = gl.Engine(model)
    *_, first = gl.stream_generate(
        model, tokenizer, messages=ASK, engine=engine, sampling=scripted(tokenizer, *TURN), date="2026-01-01"
    )
    assert first.usage is not None
    chat: list[Mapping[str, str] | Message] = [*ASK, *first.messages, {"role": "user", "content": "And?"}]
    *_, second = gl.stream_generate(
        model, tokenizer, messages=chat, engine=engine, max_tokens=1, date="2026-01-01"
    )
    assert second.usage is not None
    # All of the first prompt but its opening of the assistant's turn, whose analysis is gone now.
    assert second.usage.cached_tokens >= (first.usage.prompt_tokens - 2) // 16 * 16


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["wide"], "The sea is "),
        (["e, and d"], "The sea is wid"),
        (["nothing of it", "deep.!"], "The sea is wide, and deep."),
        (["deep", "sea"], "The "),
        (["ask"], "The sea is wide, and deep."),  # reasoning is not searched
    ],
)
def test_stop_strings_end_the_content_before_them(
    demo: tuple[GptOss, Tokenizer], stop: list[str], text: str
) -> None:
    model, tokenizer = demo
    say = scripted(tokenizer, *TURN)
    events = list(gl.stream_generate(model, tokenizer, messages=ASK, stop=stop, sampling=say))
    assert text_of(events, "final") == text
    assert events[-1].finish_reason == "stop"
    assert events[-1].messages[-1].text == text


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    comma = tokenizer.encode(",")
    assert len(comma) == 1
    text = gl.generate(
        model, tokenizer, messages=ASK, stop_token_ids=comma, sampling=scripted(tokenizer, *TURN)
    )
    assert text == "The sea is wide"


def test_max_tokens_cuts_off_and_what_was_said_stands(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    said = tokenizer.encode("They ask of the sea.")[:2]
    max_tokens = 2 + len(tokenizer.encode("analysis")) + len(said)
    events = list(
        gl.stream_generate(
            model, tokenizer, messages=ASK, max_tokens=max_tokens, sampling=scripted(tokenizer, *TURN)
        )
    )
    assert len(events) == max_tokens
    assert events[-1].finish_reason == "length"
    assert [(m.channel, m.text) for m in events[-1].messages] == [("analysis", tokenizer.decode(said))]


def test_a_plain_completion_is_the_argmax_of_the_logits(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    events = list(gl.stream_generate(model, tokenizer, "It was", max_tokens=8, sampling=GREEDY))
    tokens = tokenizer.encode("It was")
    for event in events:
        assert event.channel is None and event.is_content
        assert event.token == model.logits(tokens, last=1)[0].argmax()
        tokens.append(event.token)


def test_a_seed_repeats_and_is_reported(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    *_, last = events = list(gl.stream_generate(model, tokenizer, "It was", max_tokens=20))
    assert last.usage is not None
    again = gl.generate(
        model, tokenizer, "It was", max_tokens=20, sampling=gl.SamplingParams(seed=last.usage.seed)
    )
    assert again == "".join(event.text for event in events)
    *_, other = gl.stream_generate(model, tokenizer, "It was", max_tokens=1)
    assert other.usage is not None and other.usage.seed != last.usage.seed


def test_logprobs_are_the_models_own(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    sampling = gl.SamplingParams(seed=3, temperature=0.5, top_k=5, logprobs=3)
    [event] = gl.stream_generate(model, tokenizer, "It was", max_tokens=1, sampling=sampling)
    logits = model.logits(tokenizer.encode("It was"), last=1)[0].astype(np.float64)
    want = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert event.logprob == pytest.approx(want[event.token], abs=1e-5)
    assert [token for token, _ in event.top_logprobs] == np.argsort(-want)[:3].tolist()


def test_a_batch_gives_what_each_would_alone(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    prompts = ["It was", "The ship sailed over the", "Emma", "Call me"]
    sampling = gl.SamplingParams(seed=9)
    together = gl.batch_generate(model, tokenizer, prompts, max_tokens=15, sampling=sampling)
    assert together == [
        gl.generate(model, tokenizer, prompt, max_tokens=15, sampling=sampling) for prompt in prompts
    ]


def test_a_batch_of_chats(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    chats = [ASK, [{"role": "user", "content": "Hello"}]]
    options = {"max_tokens": 12, "sampling": GREEDY, "date": "2026-01-01"}
    together = gl.batch_generate(model, tokenizer, messages=chats, **options)  # type: ignore[arg-type]
    assert together == [gl.generate(model, tokenizer, messages=chat, **options) for chat in chats]  # type: ignore[arg-type]


def test_tasks_share_an_engine(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    prompts = ["It was", "The ship", "Emma"]
    sampling = gl.SamplingParams(seed=4)

    async def one(engine: gl.AsyncEngine, prompt: str) -> str:
        events = gl.async_stream_generate(engine, tokenizer, prompt, max_tokens=10, sampling=sampling)
        return "".join([event.text async for event in events])

    async def all_of_them() -> list[str]:
        async with gl.AsyncEngine(gl.Engine(model)) as engine:
            return await asyncio.gather(*(one(engine, prompt) for prompt in prompts))

    want = [gl.generate(model, tokenizer, prompt, max_tokens=10, sampling=sampling) for prompt in prompts]
    assert asyncio.run(all_of_them()) == want


def test_leaving_an_async_stream_cancels_and_closing_ends_the_others(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    inner = gl.Engine(model)

    async def scenario() -> None:
        engine = gl.AsyncEngine(inner)
        stream = gl.async_stream_generate(engine, tokenizer, "It was")
        await anext(stream)
        await stream.aclose()
        with pytest.raises(gl.RequestError, match="empty"):
            await anext(gl.async_stream_generate(engine, tokenizer, ""))
        endless = gl.async_stream_generate(engine, tokenizer, "The ship")
        await anext(endless)
        await asyncio.to_thread(engine.close)
        with pytest.raises(RuntimeError, match="closed"):
            async for _ in endless:
                pass
        with pytest.raises(RuntimeError, match="closed"):
            await anext(gl.async_stream_generate(engine, tokenizer, "It was"))

    asyncio.run(scenario())
    assert not inner.has_work


def test_an_engine_that_breaks_tells_its_clients(
    demo: tuple[GptOss, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = demo
    inner = gl.Engine(model)

    def breaking() -> list[TokenEvent]:
        raise SystemExit("a bug")

    async def scenario() -> None:
        async with gl.AsyncEngine(inner) as engine:
            monkeypatch.setattr(inner, "step", breaking)
            with pytest.raises(RuntimeError, match="a bug"):
                await anext(gl.async_stream_generate(engine, tokenizer, "It was"))
            with pytest.raises(RuntimeError, match="closed"):
                await anext(gl.async_stream_generate(engine, tokenizer, "It was"))

    asyncio.run(scenario())
    assert not inner.has_work


def test_a_loop_that_ends_without_a_word_does_not_keep_the_engine_busy(
    demo: tuple[GptOss, Tokenizer],
) -> None:
    model, tokenizer = demo
    inner = gl.Engine(model)
    engine = gl.AsyncEngine(inner)
    loop = asyncio.new_event_loop()
    stream = gl.async_stream_generate(engine, tokenizer, "It was")
    loop.run_until_complete(anext(stream))
    loop.close()
    deadline = time.monotonic() + 20
    while inner.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not inner.has_work
    engine.close()


def test_an_engine_serves_one_stream_at_a_time_and_its_own_model(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    engine = gl.Engine(model)
    first = gl.stream_generate(model, tokenizer, "It was", engine=engine)
    next(first)
    with pytest.raises(gl.RequestError, match="under way"):
        gl.generate(model, tokenizer, "It was", engine=engine)
    with pytest.raises(gl.RequestError, match="under way"):
        gl.AsyncEngine(engine)
    first.close()
    with pytest.raises(gl.RequestError, match="another model"):
        gl.generate(gl.load_model("demo"), tokenizer, "It was", engine=engine)


def test_progress_is_told_until_the_answer_begins(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    told: list[tuple[int, int]] = []
    stream = gl.stream_generate(
        model,
        tokenizer,
        [1] * 1200,
        max_tokens=3,
        prompt_progress=lambda done, total: told.append((done, total)),
    )
    assert len(list(stream)) == 3
    assert told == [(512, 1200), (1024, 1200), (1200, 1200)]


def test_closing_the_iterator_frees_the_engine(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    engine = gl.Engine(model)
    stream = gl.stream_generate(model, tokenizer, "It was", engine=engine)
    next(stream)
    assert engine.has_work
    stream.close()
    assert not engine.has_work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a prompt or messages"),
        ({"prompt": "a", "messages": ASK}, "either a prompt or messages"),
        ({"prompt": ""}, "empty"),
        ({"messages": []}, "messages is empty"),
        ({"prompt": "a", "reasoning_effort": "low"}, "reasoning_effort is for a chat"),
        ({"messages": ASK, "reasoning_effort": "extreme"}, "extreme"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": "x"}, "stop"),
        ({"prompt": [5000]}, "token id 5000"),
        ({"prompt": "a " * 140_000}, "context is 131072"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": 5}, "stop_token_ids"),
        ({"prompt": "a", "sampling": {"temperature": 0}}, "SamplingParams"),
        ({"messages": ASK, "date": "2026-99-99"}, "date"),
        ({"messages": ASK, "date": 5}, "date"),
        ({"messages": ASK, "instructions": 5}, "instructions"),
    ],
)
def test_what_cannot_be_served(
    demo: tuple[GptOss, Tokenizer], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(gl.RequestError, match=message):
        gl.generate(*demo, **arguments)  # type: ignore[arg-type]


def test_damage_is_found_while_loading(tmp_path: Path) -> None:
    copy = shutil.copytree(Path(gl.__file__).parent / "demo", tmp_path / "demo")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-12345] ^= 4
    for name in (b"gptoss-lite", b"gptoss-lhte"):  # a second damaged bit must not hide the first
        (copy / "model.safetensors").write_bytes(bytes(data).replace(b"gptoss-lite", name, 1))
        with pytest.raises(gl.CheckpointError, match="is damaged: its checksum"):
            gl.load_model(copy, device="cpu")


def test_an_engine_is_what_tasks_share(demo: tuple[GptOss, Tokenizer]) -> None:
    with pytest.raises(TypeError, match="Engine"):
        gl.AsyncEngine(demo[0])  # type: ignore[arg-type]


def test_prompts_must_be_several(demo: tuple[GptOss, Tokenizer]) -> None:
    with pytest.raises(gl.RequestError, match="give a list"):
        gl.batch_generate(*demo, "abc")


def test_an_unknown_option_is_named(demo: tuple[GptOss, Tokenizer]) -> None:
    with pytest.raises(TypeError, match="no option 'temperature'"):
        gl.generate(*demo, "It was", temperature=0)  # type: ignore[call-arg]


def test_an_option_that_is_none_is_left_out(demo: tuple[GptOss, Tokenizer]) -> None:
    options = {"stop": None, "stop_token_ids": None, "sampling": None, "date": None}
    assert gl.generate(*demo, "It was", max_tokens=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [0, -3, 1.5])
def test_the_rows_wanted_must_be_a_positive_number(demo: tuple[GptOss, Tokenizer], last: int) -> None:
    with pytest.raises(gl.RequestError, match="last is"):
        demo[0].logits([1, 2], last=last)


def test_a_call_cut_by_the_callers_own_stop_token_is_no_finished_call(
    demo: tuple[GptOss, Tokenizer],
) -> None:
    model, tokenizer = demo
    stop = tokenizer.encode(':"')
    *_, last = gl.stream_generate(
        model, tokenizer, messages=ASK, stop_token_ids=stop, sampling=scripted(tokenizer, *CALL)
    )
    assert last.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 26])
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(size: int) -> None:
    text = "abababc and then aab or xx"
    for stops, want in (
        (["ababc"], "ab"),
        (["aab", "n a"], "abababc and the"),
        (["c and then", "and"], "abababc "),
        (["zz"], text),
    ):
        matcher = StopStrings(stops)
        shown = [matcher.feed(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join([*shown, matcher.finish()]) == want
        assert matcher.found == (want != text)


def test_every_public_name_is_there() -> None:
    assert set(gl.__all__) <= set(dir(gl))
    for name in gl.__all__:
        assert getattr(gl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gl.nonsense
