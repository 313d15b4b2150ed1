"""/v1/completions over a socket, as the official client uses it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="openai is not installed")

from openai.types import Completion, CompletionChoice

from tests.serve_fixtures import MODEL, Api, Stage, demo_served, staged, unknown_fields

PROMPT = "The whale"


@pytest.fixture(scope="module")
def demo() -> Iterator[Api]:
    with demo_served(max_waiting=4) as api:
        yield api


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as stage:
        yield stage


def whole(api: Api, prompt: Any = PROMPT, **fields: Any) -> Completion:
    reply: Completion = api.client.completions.create(
        model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 8, **fields}
    )
    return reply


def text(api: Api, prompt: Any = PROMPT, **fields: Any) -> str:
    [choice] = whole(api, prompt, **fields).choices
    return choice.text


def streamed(api: Api, prompt: Any = PROMPT, **fields: Any) -> list[CompletionChoice]:
    """Put a stream's choices together."""
    stream = api.client.completions.create(
        model=MODEL, prompt=prompt, stream=True, **{"temperature": 0, "max_tokens": 8, **fields}
    )
    choices: dict[int, CompletionChoice] = {}
    with stream:
        for part in (choice for chunk in stream for choice in chunk.choices):
            choice = choices.setdefault(part.index, part)
            if choice is part:
                continue
            assert choice.finish_reason is None
            choice.text += part.text
            choice.finish_reason = part.finish_reason
            if choice.logprobs and part.logprobs:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    getattr(choice.logprobs, name).extend(getattr(part.logprobs, name))
    return [choices[index] for index in sorted(choices)]


def test_a_stream_and_a_whole_answer_are_the_same(demo: Api) -> None:
    fields: Any = {"prompt": [PROMPT, "Emma"], "n": 2, "temperature": 1, "seed": 5, "logprobs": 2}
    reply = whole(demo, **fields)
    assert streamed(demo, **fields) == reply.choices
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in reply.choices}) == 4
    assert text(demo, temperature=1, seed=5) == reply.choices[0].text
    assert text(demo, "Emma", temperature=1, seed=5) == reply.choices[2].text


def test_without_a_seed_answers_differ(demo: Api) -> None:
    assert text(demo, temperature=2, max_tokens=12) != text(demo, temperature=2, max_tokens=12)


def test_replies_fit_the_clients_types(demo: Api) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 3, "logprobs": 1}
    assert unknown_fields(Completion, demo.post("completions", **fields).json) == set()
    *events, usage, done = demo.post(
        "completions", **fields, stream=True, stream_options={"include_usage": True}
    ).events
    assert done == "[DONE]" and events[-1]["choices"][0]["finish_reason"] == "length"
    assert [event["usage"] for event in events] == [None] * 3
    assert usage["choices"] == [] and unknown_fields(Completion, usage) == set()
    assert usage["usage"]["total_tokens"] == len(demo.tokenizer.encode(PROMPT)) + 3


def test_a_prompt_may_be_text_or_token_ids(demo: Api) -> None:
    ids = demo.tokenizer.encode(PROMPT)
    [said] = {text(demo, prompt) for prompt in (PROMPT, [PROMPT], ids, [ids])}
    assert [choice.text for choice in whole(demo, [ids, ids]).choices] == [said, said]
    reply = whole(demo, [PROMPT, "Emma"])
    assert reply.choices[0].text == said
    assert reply.usage and reply.usage.prompt_tokens == len(ids) + len(demo.tokenizer.encode("Emma"))
    assert reply.usage.completion_tokens == 16


def test_an_echo_begins_with_the_prompt(demo: Api) -> None:
    said = text(demo)
    assert text(demo, echo=True) == streamed(demo, echo=True)[0].text == PROMPT + said
    several = whole(demo, [demo.tokenizer.encode(PROMPT), "Emma"], echo=True, max_tokens=1, n=2).choices
    assert [choice.text.startswith(PROMPT) for choice in several] == [True, True, False, False]
    assert all(choice.text.startswith("Emma") for choice in several[2:])


def test_logprobs_tell_where_each_token_begins(demo: Api) -> None:
    [choice] = whole(demo, logprobs=3, max_tokens=12).choices
    shown = choice.logprobs
    assert shown and shown.tokens and shown.text_offset and shown.token_logprobs and shown.top_logprobs
    assert "".join(shown.tokens) == choice.text and len(shown.tokens) == 12
    for token, offset, value, best in zip(
        shown.tokens, shown.text_offset, shown.token_logprobs, shown.top_logprobs, strict=True
    ):
        assert choice.text[offset:].startswith(token)
        assert len(best) == 3 and best[token] == value == max(best.values())
    [none] = whole(demo, logprobs=0, max_tokens=2).choices
    assert none.logprobs and none.logprobs.top_logprobs == [{}, {}]
    assert whole(demo, max_tokens=1).choices[0].logprobs is None


def test_offsets_count_characters_that_several_tokens_spell(stage: Stage) -> None:
    stage.script.say("a 😀🫠 b<|return|>")
    [choice] = whole(stage.api, logprobs=0, max_tokens=20).choices
    assert choice.text == "a 😀🫠 b" and choice.logprobs and choice.logprobs.text_offset
    assert choice.logprobs.text_offset[-1] == choice.text.index(" b")
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)


def test_a_stop_string_ends_the_text_and_its_logprobs(stage: Stage) -> None:
    stage.script.say("one two three four<|return|>")
    [choice] = whole(stage.api, stop=["four", " three"], logprobs=0).choices
    assert (choice.text, choice.finish_reason) == ("one two", "stop")
    assert choice.logprobs and choice.logprobs.tokens == ["one", " two"]
    assert streamed(stage.api, stop=["four", " three"], logprobs=0) == [choice]


def test_text_is_taken_as_it_stands(stage: Stage) -> None:
    stage.script.say("<|channel|>analysis<|message|>yes<|return|>")
    [choice] = whole(stage.api, "<|start|>user").choices
    assert stage.script.prompts == [stage.api.tokenizer.encode("<|start|>user")]
    assert (choice.text, choice.finish_reason) == ("analysisyes", "stop")


def test_a_second_request_finds_the_first_ones_prompt(stage: Stage) -> None:
    stage.script.say("yes<|return|>")
    for cached in (0, 96):
        usage = whole(stage.api, list(range(100))).usage
        assert usage and usage.prompt_tokens == 100 and usage.prompt_tokens_details
        assert usage.prompt_tokens_details.cached_tokens == cached


def test_a_loop_is_ended_where_that_is_asked_for(stage: Stage) -> None:
    stage.script.say("again and " * 300)
    [choice] = whole(stage.api, max_tokens=400, extra_body={"stop_on_repetition": True}).choices
    assert choice.finish_reason == "length" and choice.text.count("again") < 110


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({}, "prompt", "is missing"),
    "null": ({"prompt": None}, "prompt", "`null`"),
    "a number": ({"prompt": 5}, "prompt", "got `int`"),
    "empty text": ({"prompt": ""}, "prompt", "empty"),
    "an empty list": ({"prompt": []}, "prompt", "empty"),
    "one that is empty": ({"prompt": ["x", ""]}, "prompt[1]", "empty"),
    "no tokens": ({"prompt": [[]]}, "prompt", "empty"),
    "half a token": ({"prompt": [1.5]}, "prompt[0]", "got `float`"),
    "a negative token": ({"prompt": [1, -1]}, "prompt[1]", ">= 0"),
    "a huge token": ({"prompt": [10**40]}, "prompt[0]", "<= 2147483647"),
    "a token that is not there": ({"prompt": [1, 300000]}, "prompt", "300000: ids run from 0 to 4095"),
    "one that is not there": ({"prompt": ["x", [5000]]}, "prompt[1]", "5000: ids run from 0 to 4095"),
    "of two kinds": ({"prompt": [1, "x"]}, "prompt", "one kind"),
    "deep": ({"prompt": [[[1]]]}, "prompt[0][0]", "got `array`"),
    "many prompts": ({"prompt": ["x"] * 129}, "prompt", "at most 128"),
    "more prompts than there is room for": ({"prompt": ["x"] * 21}, "prompt", "21 answers .* at once, 20"),
    "more choices than there is room for": ({"prompt": "x", "n": 21}, "n", "21 answers .* at once, 20"),
    "the best of": ({"prompt": "x", "best_of": 2}, "best_of", "2"),
    "a suffix": ({"prompt": "x", "suffix": "y"}, "suffix", "is not supported"),
    "an echo's logprobs": ({"prompt": "x", "echo": True, "logprobs": 1}, "echo", "logprobs is not supported"),
    "a yes for a number": ({"prompt": "x", "logprobs": True}, "logprobs", "got `bool`"),
    "many logprobs": ({"prompt": "x", "logprobs": 21}, "logprobs", "<= 20"),
    "a field of chat's": ({"prompt": "x", "messages": []}, "messages", "no field"),
    "an empty stop": ({"prompt": "x", "stop": [""]}, "stop[0]", "length >= 1"),
    "a bias": ({"prompt": "x", "logit_bias": {"4096": 1}}, "logit_bias", "4096"),
    "a long text": ({"prompt": "word " * 131072}, "prompt", r"131074 tokens.* context is 131072 tokens"),
    "long tokens": ({"prompt": [5] * 131072}, "prompt", r"131072 tokens.* context is 131072 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_what_is_wrong(demo: Api, case: str, stream: bool) -> None:
    fields, param, message = BAD[case]
    reply = demo.post("completions", **fields, stream=stream)
    error = reply.json["error"]
    assert (reply.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert re.search(message, error["message"]) and len(error["message"].splitlines()) == 1
    assert not demo.engine.has_work


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}']
)
def test_a_body_that_is_no_request_is_told_so(demo: Api, body: bytes) -> None:
    reply = demo.request("POST", "/v1/completions", body)
    assert reply.status == 400 and reply.json["error"]["param"] is None
    assert reply.json["error"]["message"].startswith("the body is")
    assert text(demo, max_tokens=1)
