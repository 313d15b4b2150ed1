"""/v1/chat/completions over a socket, as the official client and careless ones use it."""

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="openai is not installed")

from openai import BadRequestError, NotFoundError
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.serve_fixtures import (
    MODEL,
    SPECIAL,
    Api,
    Stage,
    demo_served,
    golden_turns,
    is_ended,
    staged,
    unknown_fields,
)

CHAT = "chat/completions"
ASK: Any = [{"role": "user", "content": "hi"}]
THOUGHT = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
BLOCK = 16  # tokens, which the cache keeps as a whole
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def demo() -> Iterator[Api]:
    with demo_served() as api:
        yield api


@pytest.fixture(scope="module")
def shared_stage() -> Iterator[Stage]:
    with staged(max_waiting=32) as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    yield shared_stage
    shared_stage.model.seconds = 0


@dataclass(slots=True)
class Told:
    """A choice as a client sees it, put together of a stream's chunks or read from a whole answer."""

    role: str | None = None
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    call_ids: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None

    @classmethod
    def whole(cls, choice: Any) -> "Told":
        message = choice.message
        calls = message.tool_calls or []
        return cls(
            message.role,
            message.content or "",
            getattr(message, "reasoning", ""),
            [(call.function.name, call.function.arguments) for call in calls],
            [call.id for call in calls],
            choice.logprobs.content if choice.logprobs else [],
            choice.finish_reason,
        )

    @classmethod
    def streamed(cls, chunks: Sequence[ChatCompletionChunk], index: int = 0) -> "Told":
        told = cls()
        for choice in (choice for chunk in chunks for choice in chunk.choices if choice.index == index):
            assert told.finish_reason is None
            told.add(choice)
        return told

    def add(self, choice: Any) -> None:
        delta = choice.delta
        if delta.role is not None:
            assert self == Told()
            self.role = delta.role
        self.content += delta.content or ""
        self.reasoning += getattr(delta, "reasoning", "")
        for call in delta.tool_calls or []:
            if call.index == len(self.calls):
                assert call.type == "function"
                self.call_ids.append(call.id)
                self.calls.append((call.function.name, ""))
            else:
                assert (call.id, call.type, call.function.name) == (None, None, None)
            name, arguments = self.calls[call.index]
            self.calls[call.index] = name, arguments + call.function.arguments
        self.logprobs += choice.logprobs.content if choice.logprobs else []
        self.finish_reason = choice.finish_reason


def whole(api: Api, messages: Sequence[Any] = ASK, **fields: Any) -> ChatCompletion:
    reply: ChatCompletion = api.client.chat.completions.create(
        model=MODEL, messages=messages, **{"temperature": 0, **fields}
    )
    return reply


def chunks(api: Api, messages: Sequence[Any] = ASK, **fields: Any) -> list[ChatCompletionChunk]:
    stream = api.client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, **{"temperature": 0, **fields}
    )
    with closing(stream):
        return list(stream)


def both(stage: Stage, answer: str, messages: Sequence[Any] = ASK, **fields: Any) -> Told:
    """Let an answer be said whole and as a stream; check that they are the same, but for ids of calls."""
    stage.script.say(answer)
    told = Told.whole(whole(stage.api, messages, **fields).choices[0])
    streamed = Told.streamed(chunks(stage.api, messages, **fields))
    assert len(set(told.call_ids + streamed.call_ids)) == 2 * len(told.calls)
    streamed.call_ids = told.call_ids
    assert streamed == told
    return told


# Streams and whole answers

TALE: Any = [{"role": "user", "content": "Tell me about the whale."}]
DRAWN: dict[str, Any] = {
    "temperature": 0.8, "seed": 7, "max_tokens": 48, "reasoning_effort": "low", "n": 3, "logprobs": True,
    "top_logprobs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tale(demo: Api) -> ChatCompletion:
    """Three answers of the bundled model's, drawn by one seed."""
    return whole(demo, TALE, **DRAWN)


def test_a_stream_and_a_whole_answer_are_the_same(demo: Api, tale: ChatCompletion) -> None:
    told = chunks(demo, TALE, **DRAWN, stream_options={"include_usage": True})
    for choice in tale.choices:
        assert Told.streamed(told, choice.index) == Told.whole(choice)
        assert Told.whole(choice).reasoning.startswith("Reasoning: low.") and choice.message.content
    assert tale.usage and told[-1].usage
    assert told[-1].usage.total_tokens == tale.usage.total_tokens
    assert [chunk.usage for chunk in told[:-1]] == [None] * (len(told) - 1)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in told}) == 1


def test_the_async_client_hears_the_same(demo: Api, tale: ChatCompletion) -> None:
    async def ask() -> Sequence[Told]:
        async with demo.async_client() as client:

            async def stream() -> Told:
                chunks = await client.chat.completions.create(**fields, stream=True)
                return Told.streamed([chunk async for chunk in chunks])

            async def whole() -> Told:
                return Told.whole((await client.chat.completions.create(**fields)).choices[0])

            return await asyncio.gather(stream(), whole())

    fields: Any = {"model": MODEL, "messages": TALE} | DRAWN | {"n": 1}
    assert list(asyncio.run(ask())) == [Told.whole(tale.choices[0])] * 2


def test_the_responses_api_says_the_same(demo: Api, tale: ChatCompletion) -> None:
    response = demo.client.responses.create(
        model=MODEL, input=TALE, temperature=0.8, max_output_tokens=48, reasoning={"effort": "low"},
        extra_body={"seed": 7},
    )  # fmt: skip
    told = Told.whole(tale.choices[0])
    assert response.output_text == told.content
    assert response.output[0].type == "reasoning" and response.output[0].content
    assert response.output[0].content[0].text == told.reasoning


def test_the_clients_own_stream_helper_comes_to_the_same(stage: Stage) -> None:
    call = '<|start|>assistant<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'
    stage.script.say(f"{THOUGHT}hm<|end|>{FINAL}A moment.<|end|>{call}")
    with stage.api.client.chat.completions.stream(model=MODEL, messages=ASK) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "A moment." and message.tool_calls
    assert message.tool_calls[0].function.arguments == '{"a": 1}'


def test_replies_fit_the_clients_types(stage: Stage) -> None:
    call = "<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    stage.script.say(f"{THOUGHT}hm<|end|>{FINAL}A moment.<|end|>{call}")
    fields = {"messages": ASK, "logprobs": True, "top_logprobs": 1}
    reply = stage.api.post(CHAT, **fields)
    assert reply.headers["content-type"] == "application/json"
    assert unknown_fields(ChatCompletion, reply.json) == {"reasoning"}
    stream = stage.api.post(CHAT, **fields, stream=True, stream_options={"include_usage": True})
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = stream.events
    assert done == "[DONE]"
    assert set.union(*(unknown_fields(ChatCompletionChunk, event) for event in events)) == {"reasoning"}
    first, last = events[0]["choices"][0], events[-2]["choices"][0]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")
    assert events[-1]["choices"] == [] and events[-1]["usage"] == reply.json["usage"] | {
        "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"]
    }
    plain = stage.api.post(CHAT, **fields, stream=True).events[:-1]
    assert not any("usage" in event for event in plain)


# What the model is told


def test_reasoning_stands_apart_from_content(stage: Stage) -> None:
    thoughts = f"{THOUGHT}Think, <|end|><|start|>assistant{THOUGHT}think.<|end|>"
    told = both(stage, f"{thoughts}{FINAL}Yes.<|return|>")
    assert (told.reasoning, told.content, told.finish_reason) == ("Think, think.", "Yes.", "stop")
    assert stage.api.post(CHAT, messages=ASK).json["choices"][0]["message"].keys() == {
        "role", "content", "reasoning", "refusal",
    }  # fmt: skip


def test_reasoning_is_repeated_under_its_older_name_where_that_is_set() -> None:
    with staged(reasoning_content=True) as stage:
        stage.script.say(f"{THOUGHT}Think.<|end|>{FINAL}Yes.<|return|>")
        message = stage.api.post(CHAT, messages=ASK).json["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "Think."
        events = stage.api.post(CHAT, messages=ASK, stream=True).events
        deltas = [event["choices"][0]["delta"] for event in events[:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Think."
        assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)


@pytest.mark.parametrize(
    ("fields", "effort"),
    [({}, "medium"), ({"reasoning_effort": "low"}, "low"), ({"reasoning_effort": "high"}, "high")],
)
def test_the_effort_is_told_to_the_model(stage: Stage, fields: dict[str, Any], effort: str) -> None:
    stage.script.say("hello")
    whole(stage.api, **fields)
    assert f"\n\nReasoning: {effort}\n\n" in stage.script.heard()


def test_system_and_developer_messages_and_tools_become_the_developers(stage: Stage) -> None:
    messages = [
        {"role": "developer", "content": "Second."},
        {"role": "system", "content": [{"type": "text", "text": "Fir"}, {"type": "text", "text": "st."}]},
        {"role": "user", "name": "alice", "content": "Hi <|end|>"},
        {"role": "developer", "content": "Third."},
    ]
    stage.script.say("hello")
    whole(stage.api, messages, tools=[WEATHER])
    _, _, rest = stage.script.heard().partition("# Valid channels:")
    assert rest == (
        " analysis, commentary, final. Channel must be included for every message.\n"
        "Calls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nFirst.\n\nSecond.\n\nThird.\n\n# Tools\n\n"
        "## functions\n\nnamespace functions {\n\n// Tells the weather.\n"
        "type weather = (_: {\ncity: string,\n}) => any;\n\n} // namespace functions<|end|>"
        "<|start|>user:alice<|message|>Hi <|end|><|end|><|start|>assistant"
    )
    assert stage.script.prompts[0].count(stage.api.tokenizer.special["<|end|>"]) == 3


# Tools

CALL = "<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>"


def test_a_tool_loop_goes_round(stage: Stage) -> None:
    stage.script.say(
        f'{THOUGHT}Ask for it.<|end|>{CALL}{{"city": "Bern"}}<|call|>', f"{FINAL}Sunny.<|return|>"
    )
    told = chunks(stage.api, tools=[WEATHER])
    call = Told.streamed(told)
    assert (call.reasoning, call.content, call.finish_reason) == ("Ask for it.", "", "tool_calls")
    assert call.calls == [("weather", '{"city": "Bern"}')]
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in told) > 3  # not all at once
    reply = whole(stage.api, tools=[WEATHER])
    messages = [
        *ASK,
        reply.choices[0].message,
        {"role": "tool", "tool_call_id": Told.whole(reply.choices[0]).call_ids[0], "content": "sun"},
    ]
    answer = whole(stage.api, messages, tools=[WEATHER]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Sunny.", "stop")
    assert stage.script.heard().endswith(
        f'hi<|end|><|start|>assistant{THOUGHT}Ask for it.<|end|>{CALL}{{"city": "Bern"}}<|call|>'
        "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>sun<|end|><|start|>assistant"
    )


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_replayed_reasoning_is_read_under_any_of_its_names(stage: Stage, name: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": f'{{"{name}": 1}}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, name: "I shall ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sun"},
    ]
    stage.script.say(f"{FINAL}Sunny.<|return|>")
    whole(stage.api, messages, tools=[WEATHER])
    assert f"{THOUGHT}I shall ask.<|end|>{CALL}" in stage.script.heard()
    messages += [{"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And now?"}]
    whole(stage.api, messages, tools=[WEATHER])
    assert "I shall ask" not in stage.script.heard() and "<|message|>Sunny.<|end|>" in stage.script.heard()


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("<|channel|>analysis to=functions.f code", "f"),
        (" to=functions.f<|channel|>final", "f"),
        ("<|channel|>commentary to=python code", "python"),
        ("<|channel|>analysis to=browser.search", "browser.search"),
        ("<|channel|>commentary to=functions.a/b<|constrain|>json", "a_b"),
        ("<|channel|>commentary to=functions.", "functions"),
    ],
)
def test_a_recipient_makes_a_call_on_any_channel_whoever_it_is(stage: Stage, header: str, name: str) -> None:
    told = both(stage, f'{header}<|message|>{{"a": 1}}<|call|>', tools=[WEATHER])
    assert (told.calls, told.content, told.reasoning) == ([(name, '{"a": 1}')], "", "")
    assert told.finish_reason == "tool_calls"
    reply = whole(stage.api, tools=[WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": (reply.tool_calls or [])[0].id, "content": "done"}
    whole(stage.api, [*ASK, reply, result], tools=[WEATHER])
    assert f'{header}<|message|>{{"a": 1}}<|call|>' in stage.script.heard()


def test_several_calls_of_a_turn_have_indices_of_their_own(stage: Stage) -> None:
    calls = "<|end|><|start|>assistant".join(
        f"<|channel|>commentary to=functions.f{i}<|message|>{{}}{' ' * i}" for i in range(3)
    )
    told = both(stage, f"{calls}<|call|>")
    assert told.calls == [("f0", "{}"), ("f1", "{} "), ("f2", "{}  ")]
    assert len(set(told.call_ids)) == 3


def test_a_call_without_arguments_is_told(stage: Stage) -> None:
    assert both(stage, f"{CALL}<|call|>").calls == [("weather", "")]


def test_words_before_a_call_are_content(stage: Stage) -> None:
    told = both(stage, f"<|channel|>commentary<|message|>A moment.<|end|>{CALL}{{}}<|call|>")
    assert (told.content, told.calls) == ("A moment.", [("weather", "{}")])
    assert stage.api.post(CHAT, messages=ASK).json["choices"][0]["message"]["content"] == "A moment."
    stage.script.say(f"{CALL}{{}}<|call|>")
    assert stage.api.post(CHAT, messages=ASK).json["choices"][0]["message"]["content"] is None


def test_any_line_break_may_be_said(stage: Stage) -> None:
    said = "a\u2028b\x85c\r\n\nd\x0be: \0"
    assert both(stage, f"<|channel|>final<|message|>{said}<|return|>").content == said


# Malformed turns


@golden_turns()
def test_a_malformed_turn_is_read(stage: Stage, turn: dict[str, Any]) -> None:
    told = both(stage, turn["tokens"], max_tokens=max(1, len(turn["tokens"])))
    calls = [m for m in turn["recommended"] if m["recipient"]]
    others = [m for m in turn["recommended"] if not m["recipient"]]
    assert told.reasoning == "".join(m["text"] for m in others if m["channel"] == "analysis")
    assert told.content == "".join(m["text"] for m in others if m["channel"] != "analysis")
    assert told.calls == [(m["recipient"].removeprefix("functions."), m["text"]) for m in calls]
    ends = not turn["tokens"] or is_ended(turn)
    assert told.finish_reason == ("length" if not ends else "tool_calls" if calls else "stop")
    assert not SPECIAL.search(repr(told))


# How an answer is drawn and where it ends


def test_choices_differ(tale: ChatCompletion) -> None:
    assert len({choice.message.content for choice in tale.choices}) == 3


@pytest.fixture(scope="module")
def likeliest(demo: Api) -> Any:
    """What the bundled model says when it is always the likeliest."""
    return whole(demo, TALE, max_tokens=24).choices[0].message


@pytest.mark.parametrize(
    "fields", [{"top_p": 1e-9}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}]
)
def test_filters_leave_the_likeliest_token_only(demo: Api, likeliest: Any, fields: dict[str, Any]) -> None:
    assert whole(demo, TALE, max_tokens=24, temperature=2, seed=-1, **fields).choices[0].message == likeliest


@pytest.mark.parametrize(
    "fields", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 1.3}}]
)
def test_penalties_change_what_is_said(demo: Api, likeliest: Any, fields: dict[str, Any]) -> None:
    assert whole(demo, TALE, max_tokens=24, **fields).choices[0].message != likeliest


def test_a_logit_bias_forces_and_forbids_a_token(stage: Stage) -> None:
    [yes] = stage.script.sampled("yes")
    told = both(stage, f"{FINAL}no<|return|>", logit_bias={str(yes): 100}, max_tokens=3)
    assert (told.content, told.finish_reason) == ("yesyesyes", "length")
    [no] = stage.script.sampled("no")
    assert both(stage, f"{FINAL}no<|return|>", logit_bias={str(no): -100}).content != "no"


STOPS: dict[str, tuple[Any, str, str, str]] = {
    "a string": ("END", "one two END three", "one two ", "stop"),
    "the first of a list": (["three", "END"], "one two END three", "one two ", "stop"),
    "across tokens": ("wo thr", "one two three", "one t", "stop"),
    "within a token": ("ell", "hello", "h", "stop"),
    "at the beginning": ("one", "one two", "", "stop"),
    "begun and not ended": ("three four", "one two three", "one two three", "stop"),
    "none": ([], "one two", "one two", "stop"),
    "not there": ("x", "one two", "one two", "stop"),
    "beyond the limit": ("seven", "one two three four five six seven", "one two three four", "length"),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings_end_the_content(stage: Stage, case: str) -> None:
    stop, said, shown, reason = STOPS[case]
    told = both(stage, f"<|channel|>final<|message|>{said}<|return|>", stop=stop, max_tokens=7)
    assert (told.content, told.finish_reason) == (shown, reason)


def test_stop_strings_are_looked_for_in_content_only(stage: Stage) -> None:
    thought = f"{THOUGHT}STOP<|end|>"
    told = both(stage, f'{thought}{CALL}{{"city": "STOP"}}<|call|>', stop="STOP")
    assert (told.reasoning, told.calls) == ("STOP", [("weather", '{"city": "STOP"}')])
    told = both(stage, f"{thought}{FINAL}STO<|end|>{FINAL}P and STOP it<|return|>", stop="STOP")
    assert (told.reasoning, told.content) == ("STOP", "STOP and ")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_limit_ends_an_answer(stage: Stage, name: str) -> None:
    stage.script.say("<|channel|>final<|message|>one two three four<|return|>")
    limit: Any = {name: 5}
    reply = whole(stage.api, **limit)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("one two", "length")
    assert reply.usage and reply.usage.completion_tokens == 5
    assert whole(stage.api, max_tokens=9, max_completion_tokens=9).choices[0].finish_reason == "stop"


def test_the_context_ends_an_answer() -> None:
    with staged(context=100) as stage:
        stage.script.say("<|channel|>final<|message|>" + "on and " * 100)
        reply = whole(stage.api)
        assert reply.usage and reply.usage.total_tokens == 100
        assert reply.choices[0].finish_reason == "length"


def test_a_call_cut_off_by_the_limit_is_no_finished_call(stage: Stage) -> None:
    begun = len(stage.script.sampled(f'{CALL}{{"city'))
    told = both(stage, f'{CALL}{{"city": "Bern"}}<|call|>', max_tokens=begun)
    assert told.calls == [("weather", '{"city')] and told.finish_reason == "length"


def test_a_loop_is_ended_where_that_is_asked_for(stage: Stage) -> None:
    loop = "<|channel|>final<|message|>" + "again and again, " * 100
    ended = both(stage, loop, max_tokens=300, extra_body={"stop_on_repetition": True})
    assert ended.finish_reason == "length" and loop.partition(ended.content)[1]
    reply = whole(stage.api, max_tokens=300, extra_body={"stop_on_repetition": True})
    assert reply.usage and reply.usage.completion_tokens < 250
    reply = whole(stage.api, max_tokens=300)
    assert reply.usage and reply.usage.completion_tokens == 300
    counting = "<|channel|>final<|message|>" + "".join(f" {i}," for i in range(120)) + "<|return|>"
    assert both(stage, counting, extra_body={"stop_on_repetition": True}).finish_reason == "stop"


# Log-probabilities and usage


def test_logprobs_are_those_of_the_contents_tokens(demo: Api, tale: ChatCompletion) -> None:
    for told in map(Told.whole, tale.choices):
        assert told.reasoning and told.content
        assert b"".join(bytes(entry.bytes) for entry in told.logprobs) == told.content.encode()
        for entry in told.logprobs:
            assert entry.logprob <= 0 and bytes(entry.bytes).decode(errors="replace") == entry.token
            best = [top.logprob for top in entry.top_logprobs]
            assert len(best) == 2 and best[0] >= max(best[1], entry.logprob)
    assert whole(demo, TALE, max_tokens=1).choices[0].logprobs is None


@pytest.mark.parametrize("stop", [None, " two", ["never", " three"]])
def test_logprobs_end_where_the_content_does(stage: Stage, stop: Any) -> None:
    preamble = "<|channel|>commentary<|message|>A moment, 😀🫠.<|end|>"
    answer = f"{THOUGHT}hm<|end|><|start|>assistant{preamble}{FINAL}one two three<|return|>"
    told = both(stage, answer, logprobs=True, stop=stop)
    assert told.content.startswith("A moment, 😀🫠.one")
    assert b"".join(bytes(entry.bytes) for entry in told.logprobs) == told.content.encode()
    assert all(entry.top_logprobs == [] for entry in told.logprobs)


def test_a_stop_string_within_a_token_keeps_that_tokens_logprob_back(stage: Stage) -> None:
    told = both(stage, "<|channel|>final<|message|>one hello<|return|>", logprobs=True, stop="ell")
    assert (told.content, [entry.token for entry in told.logprobs]) == ("one h", ["one"])


@pytest.mark.parametrize("stop", [None, "x"])
def test_a_character_cut_in_two_has_its_logprobs(stage: Stage, stop: str | None) -> None:
    said = "<|channel|>final<|message|>yes\N{MELTING FACE}"
    tokens = stage.script.sampled(said)
    told = both(stage, f"{said}<|return|>", logprobs=True, stop=stop, max_tokens=len(tokens) - 1)
    assert (told.content, told.finish_reason) == ("yes\N{REPLACEMENT CHARACTER}", "length")
    written = b"".join(bytes(entry.bytes) for entry in told.logprobs)
    assert written == b"".join(map(stage.api.tokenizer.token_bytes, tokens[3:-1]))


@pytest.mark.parametrize("stop", [None, " STOP"])
def test_text_of_a_malformed_header_has_no_logprobs(stage: Stage, stop: str | None) -> None:
    turn = f"<|channel|>final I must refuse<|end|>{FINAL}Sorry STOP<|return|>"
    told = both(stage, turn, logprobs=True, stop=stop)
    assert told.content == ("I must refuseSorry" if stop else "I must refuseSorry STOP")
    assert "".join(entry.token for entry in told.logprobs) == told.content.removeprefix("I must refuse")


def test_logprobs_are_of_what_was_drawn_from(stage: Stage) -> None:
    told = both(stage, "<|channel|>final<|message|>yes<|return|>", logprobs=True, top_logprobs=20)
    [entry] = told.logprobs
    assert entry.logprob == pytest.approx(0, abs=1e-6) and len(entry.top_logprobs) == 20
    assert (entry.top_logprobs[0].token, entry.top_logprobs[1].logprob) == ("yes", pytest.approx(-60, abs=1))


def test_usage_counts_reasoning_and_what_was_cached(stage: Stage) -> None:
    messages = [{"role": "user", "content": "count " * 50}]
    stage.script.say(f"{THOUGHT}one two three<|end|>{FINAL}four<|return|>")
    first = whole(stage.api, messages).usage
    assert first and first.prompt_tokens_details and first.completion_tokens_details
    assert first.prompt_tokens == len(stage.script.prompts[0])
    assert first.completion_tokens_details.reasoning_tokens == 5  # with what opens and ends the message
    assert first.completion_tokens == len(
        stage.script.sampled(f"{THOUGHT}one two three<|end|>{FINAL}four<|return|>")
    )
    [*_, last] = chunks(stage.api, messages, stream_options={"include_usage": True})
    assert last.usage and last.usage.prompt_tokens_details
    assert last.usage.prompt_tokens_details.cached_tokens == first.prompt_tokens // BLOCK * BLOCK
    assert last.usage.completion_tokens_details == first.completion_tokens_details


# Clients that wait and clients that go


def test_a_silent_stream_is_kept_alive() -> None:
    with staged(keep_alive_seconds=0.02) as stage:
        stage.script.say("<|channel|>final<|message|>yes<|return|>")
        stage.model.seconds = 0.06
        assert stage.api.post(CHAT, messages=ASK, stream=True).body.count(b": keep-alive\n\n") > 3
        assert Told.streamed(chunks(stage.api)).content == "yes"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_blocks_within_a_step(stage: Stage, stream: bool) -> None:
    async def ask_and_go() -> int:
        async with stage.api.async_client() as client:
            asked = asyncio.create_task(client.chat.completions.create(**fields))
            if stream:
                answer = await asked
                async for chunk in answer:
                    if chunk.choices[0].delta.content:
                        break
                stage.model.seconds = 0.3
                await answer.close()
            else:
                while engine.statistics.generated_tokens < before + 10:
                    await asyncio.sleep(0.01)
                stage.model.seconds = 0.3
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
            return engine.statistics.steps

    messages = [{"role": "user", "content": f"Stream: {stream}"}]
    fields: Any = {"model": MODEL, "messages": messages, "n": 2, "stream": stream}
    engine = stage.api.engine
    free, before = engine.free_tokens, engine.statistics.generated_tokens
    stage.script.say("<|channel|>final<|message|>" + "on and on " * 500)
    steps, deadline = asyncio.run(ask_and_go()), time.monotonic() + 30
    while engine.running or engine.waiting:
        assert engine.statistics.steps <= steps + 2 and time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.free_tokens == free


# What the cache is good for


def prefilled(reply: ChatCompletion) -> int:
    """Tokens of the prompt that were computed."""
    assert reply.usage and reply.usage.prompt_tokens_details
    return reply.usage.prompt_tokens - (reply.usage.prompt_tokens_details.cached_tokens or 0)


@pytest.mark.parametrize("sends_reasoning", [False, True])
def test_a_second_turn_computes_the_last_answer_and_what_is_new(stage: Stage, sends_reasoning: bool) -> None:
    final = f"{FINAL}{'The sea is wide. ' * 20}<|return|>"
    stage.script.say(
        f"{THOUGHT}{f'I think of {sends_reasoning} things. ' * 60}<|end|>{final}", f"{FINAL}Yes."
    )
    asked = [{"role": "user", "content": "Tell me of the sea, the sky and the land. " * 30}]
    message = whole(stage.api, asked).choices[0].message
    turn: Any = message if sends_reasoning else {"role": "assistant", "content": message.content}
    before = stage.api.metrics()
    reply = whole(stage.api, [*asked, turn, {"role": "user", "content": "And the sky?"}])
    after = stage.api.metrics()
    added = final.replace("<|return|>", "<|end|>").removeprefix("<|start|>assistant")
    added += "<|start|>user<|message|>And the sky?<|end|><|start|>assistant"
    assert stage.script.prompts[1] == stage.script.prompts[0] + stage.script.sampled(added)
    assert prefilled(reply) <= len(stage.script.sampled(added)) + BLOCK
    counted = {name: after[f"{name}_tokens_total"] - before[f"{name}_tokens_total"]
               for name in ("prompt", "cached", "prefilled")}  # fmt: skip
    assert reply.usage and counted["prompt"] == reply.usage.prompt_tokens
    assert counted["prefilled"] == prefilled(reply) == counted["prompt"] - counted["cached"]


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.weather<|channel|>commentary <|constrain|>json",
        "<|channel|>commentary to=functions.weather code",
        "<|channel|>analysis to=functions.weather",
        "assistant<|channel|>commentary  to=functions.weather<|channel|>commentary",
    ],
)
def test_a_tool_loop_computes_only_what_is_new(stage: Stage, header: str) -> None:
    def call(city: str) -> list[int]:
        """Say a call in tokens of one character each, as the renderer would not."""
        thought = f"{THOUGHT}{f'I must know about {city}, {header}. ' * 30}<|end|><|start|>assistant"
        arguments = [token for character in f'{{ "city":"{city}" }}' for token in sampled(character)]
        return [*sampled(f"{thought}{header}<|message|>"), *arguments, *sampled("<|call|>")]

    sampled = stage.script.sampled
    said = [call("Bern"), call("Rome"), sampled(f"{FINAL}Sunny.<|return|>")]
    stage.script.say(*said)
    messages: list[Any] = [{"role": "user", "content": f"What is the weather, {header}? " * 20}]
    for turn in range(3):
        reply = whole(stage.api, messages, tools=[WEATHER])
        message = reply.choices[0].message
        if turn:
            new = sampled(
                "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"
                f"{turn - 1} degrees<|end|><|start|>assistant"
            )
            assert stage.script.prompts[turn] == [*stage.script.prompts[turn - 1], *said[turn - 1], *new]
            assert prefilled(reply) <= len(new) + BLOCK
        for tool_call in message.tool_calls or []:
            result = {"role": "tool", "tool_call_id": tool_call.id, "content": f"{turn} degrees"}
            messages += [message, result]
    assert message.content == "Sunny."


def test_keys_share_nothing_that_was_cached() -> None:
    with staged(api_keys=("mine", "theirs")) as stage:
        said = "Certainly."
        letters = [token for letter in said for token in stage.script.sampled(letter)]
        stage.script.say([*stage.script.sampled("<|channel|>final<|message|>"), *letters])
        mine = stage.api
        theirs = replace(mine, client=mine.client.with_options(api_key="theirs"))
        asked = [{"role": "user", "content": "A secret. " * 40}]
        assert prefilled(whole(mine, asked)) == len(stage.script.prompts[0])
        more = [*asked, {"role": "assistant", "content": said}, {"role": "user", "content": "Thanks."}]
        assert prefilled(whole(mine, more)) < 60
        assert prefilled(whole(theirs, more)) == len(stage.script.prompts[2])
        _, known, afresh = map(len, stage.script.prompts)
        assert known - afresh == len(letters) - len(stage.script.sampled(said))


# What cannot be answered


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": ASK, **fields}


def said(*messages: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages}


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"{}" + b"}" * depth


TOOL_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD: dict[str, tuple[Any, str | None, str]] = {
    "nothing": (b"", None, "no sound JSON"),
    "half": (b'{"model": "gpt', None, "no sound JSON"),
    "more than one": (b'{"model": "%b", "messages": []} {}' % MODEL.encode(), "messages", "length >= 1"),
    "no UTF-8": (b'{"model": "\xff"}', None, "no sound JSON"),
    "not a number": (b'{"temperature": NaN}', None, "no sound JSON"),
    "infinite": (b'{"temperature": 1e999}', "temperature", "out of range"),
    "half a character": (b'{"user": "\\ud800"}', None, "no sound JSON"),
    "the other half": (b'{"user": "\\udc00 "}', None, "no sound JSON"),
    "a list": (b"[]", None, "expected `object`"),
    "null": (b"null", None, "expected `object`"),
    "deep": (b"[" * 100_000, None, "expected `object`"),
    "deep messages": (chat(messages=[[[[[[]]]]]]), "messages[0]", "expected `object`"),
    "deep parameters": (
        b'{"tools": [{"type": "function", "function": {"name": "f", "parameters": %b}}]}' % nested(50_000),
        None, "too deeply",
    ),
    "no model": ({"messages": ASK}, "model", "model is missing"),
    "no messages": ({"model": MODEL}, "messages", "messages is missing"),
    "empty messages": (chat(messages=[]), "messages", "length >= 1"),
    "text for messages": (chat(messages="hi"), "messages", "expected `array`"),
    "a role": (said({"role": "critic", "content": "x"}), "messages[0].role", "'critic'"),
    "no role": (said({"content": "x"}), "messages[0].role", "is missing"),
    "no content": (said({"role": "user"}), "messages[0].content", "is missing"),
    "null for content": (said({"role": "user", "content": None}), "messages[0].content", "`null`"),
    "a part": (said({"role": "user", "content": ["x"]}), "messages[0].content[0]", "expected `object`"),
    "an image": (
        said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}),
        "messages[0].content[0].type", "'image_url', and there is .text.; gpt-oss reads text only",
    ),
    "a sound": (
        said(ASK[0], {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]}),
        "messages[1].content[1].type", "'input_audio', and there is .text.; gpt-oss reads text only",
    ),
    "a field of a message": (
        said({"role": "user", "content": "x", "mood": "sad"}), "messages[0].mood", "no field",
    ),
    "an empty turn": (said({"role": "assistant", "content": None}), "messages[0]", "none of 'content'"),
    "a call's kind": (
        said({"role": "assistant", "tool_calls": [TOOL_CALL | {"type": "custom"}]}),
        "messages[0].tool_calls[0].type", "'custom'",
    ),
    "a call's arguments": (
        said({"role": "assistant", "tool_calls": [TOOL_CALL | {"function": {"name": "f", "arguments": 5}}]}),
        "messages[0].tool_calls[0].function.arguments", "got `int`",
    ),
    "a result of no call": (
        said({"role": "tool", "tool_call_id": "c", "content": "x"}), "messages[0]", "'c' is of no tool call",
    ),
    "a field": (chat(colour="red"), "colour", "no field that is supported"),
    "a field of two lines": (chat(**{"a\nb\u2028c": 1}), "a b c", "a b c is no field"),
    "text for a number": (chat(temperature="hot"), "temperature", "got `str`"),
    "a hot temperature": (chat(temperature=2.1), "temperature", "<= 2"),
    "a probability": (chat(top_p=1.1), "top_p", "<= 1"),
    "a negative count": (chat(top_k=-1), "top_k", ">= 0"),
    "a huge count": (chat(top_k=10**40), "top_k", "<= 2147483647"),
    "a huge seed": (chat(seed=2**63), "seed", "<= 9223372036854775807"),
    "a huge limit": (chat(max_tokens=10**40), "max_tokens", "<= 2147483647"),
    "no room": (chat(max_completion_tokens=0), "max_completion_tokens", ">= 1"),
    "two limits": (chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "differ"),
    "no choice": (chat(n=0), "n", ">= 1"),
    "too many choices": (chat(n=129), "n", "<= 128"),
    "more choices than there is room for": (chat(n=128), "n", "128 answers are more than .* 48"),
    "an empty stop": (chat(stop=""), "stop", "length >= 1"),
    "an empty stop in a list": (chat(stop=["a", ""]), "stop[1]", "length >= 1"),
    "too many stops": (chat(stop=["a"] * 17), "stop", "length <= 16"),
    "a long stop": (chat(stop="a" * 1001), "stop", "length <= 1000"),
    "a word for a token": (chat(logit_bias={"yes": 1}), "logit_bias", "'yes'"),
    "a token that is not there": (chat(logit_bias={"300000": 1}), "logit_bias", "300000"),
    "a huge token": (chat(logit_bias={"9" * 5000: 1}), "logit_bias", "2147483647"),
    "a strong bias": (chat(logit_bias={"5": 101}), "logit_bias[...]", "<= 100"),
    "logprobs without": (chat(top_logprobs=2), "top_logprobs", "set logprobs"),
    "many logprobs": (chat(logprobs=True, top_logprobs=21), "top_logprobs", "<= 20"),
    "options of no stream": (
        chat(stream=False, stream_options={"include_usage": True}), "stream_options", "set stream",
    ),
    "an option": (chat(stream=True, stream_options={"colour": 1}), "stream_options.colour", "no field"),
    "an effort": (chat(reasoning_effort="max"), "reasoning_effort", "low, medium or high"),
    "an empty effort": (chat(reasoning_effort=""), "reasoning_effort", "low, medium or high"),
    "a format": (chat(response_format={"type": "xml"}), "response_format.type", "'xml'"),
    "a schema without": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
        "response_format.json_schema.schema", "is missing",
    ),
    "a tool's kind": (chat(tools=[{"type": "browser"}]), "tools[0].type", "'browser'"),
    "a tool's name": (
        chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function", "'a b'",
    ),
    "a tool twice": (chat(tools=[WEATHER, WEATHER]), "tools[1].function", "'weather' is there already"),
    "a choice of tools": (chat(tools=[WEATHER], tool_choice="maybe"), "tool_choice", "'maybe'"),
    "a tool that is not there": (
        chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "tide"}}),
        "tool_choice", "'tide'",
    ),
    "a call of nothing": (chat(tool_choice="required"), "tool_choice", "no tools"),
    "sound": (chat(modalities=["text", "audio"]), "modalities[1]", "'audio'"),
    "a store": (chat(store=True), "store", "True"),
    "functions of old": (chat(functions=[]), "functions", "no field"),
    "a long prompt": (
        said({"role": "user", "content": "word " * 5000}),
        "messages", "5068 tokens.* context is 4096 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_what_is_wrong(stage: Stage, case: str, stream: bool) -> None:
    body, param, message = BAD[case]
    body = body if isinstance(body, bytes) else {"stream": stream} | body
    reply = stage.api.request("POST", f"/v1/{CHAT}", body)
    error = reply.json["error"]
    assert (reply.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert re.search(message, error["message"]) and len(error["message"].splitlines()) == 1
    assert error.keys() == {"message", "type", "param", "code"}
    code = "context_length_exceeded" if case == "a long prompt" else None
    assert error["code"] == code and len(error["message"]) < 500


def test_bad_requests_disturb_nobody(stage: Stage) -> None:
    async def ask() -> ChatCompletion:
        async with stage.api.async_client() as client:
            asked = asyncio.create_task(client.chat.completions.create(**fields))
            while not stage.script.prompts:
                await asyncio.sleep(0.01)
            for body, _, _ in BAD.values():
                await asyncio.to_thread(stage.api.request, "POST", f"/v1/{CHAT}", body)
            assert not asked.done()
            stage.model.seconds = 0
            answer: ChatCompletion = await asked
            return answer

    fields: Any = {"model": MODEL, "messages": TALE}
    stage.script.say("<|channel|>final<|message|>" + "on and " * 20 + "on<|return|>")
    stage.model.seconds = 0.5
    assert asyncio.run(ask()).choices[0].message.content == "on and " * 20 + "on"
    assert stage.api.request("GET", "/health").json == {"status": "ok"}


def test_the_client_raises_what_it_was_told(stage: Stage) -> None:
    with pytest.raises(BadRequestError) as bad:
        whole(stage.api, temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == ("temperature", None, "invalid_request_error")
    with pytest.raises(NotFoundError) as unknown:
        stage.api.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    assert f"this server has '{MODEL}'" in unknown.value.message
    with pytest.raises(NotFoundError):
        stage.api.client.models.retrieve("gpt-4")
    assert [model.id for model in stage.api.client.models.list()] == [MODEL]


@pytest.mark.parametrize("endpoint", [CHAT, "completions", "responses"])
def test_another_method_or_kind_of_body_is_refused(stage: Stage, endpoint: str) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        reply = stage.api.request(method, f"/v1/{endpoint}", chat())
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert reply.json["error"]["message"] == f"/v1/{endpoint} takes no {method}"
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = stage.api.request("POST", f"/v1/{endpoint}", chat(), kind)
        assert (reply.status, reply.json["error"]["type"]) == (415, "invalid_request_error")
        assert reply.json["error"]["message"] == f"content-type is {kind!r}: send application/json"


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v2/chat/completions", "/v1/responses/resp_1", "/v1/a%0Ab"]
)
def test_a_path_that_is_not_there_is_told_so(stage: Stage, path: str) -> None:
    reply = stage.api.request("POST", path, chat())
    message = reply.json["error"]["message"]
    assert reply.status == 404 and message == f"there is no {path.replace('%0A', ' ')}"
