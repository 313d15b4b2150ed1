"""/v1/responses over a socket, as the official client uses it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="openai is not installed")

from openai.types.responses import Response, ResponseStreamEvent

from tests.serve_fixtures import (
    MODEL,
    SPECIAL,
    Reply,
    Stage,
    golden_turns,
    is_ended,
    staged,
    unknown_fields,
)

THOUGHT = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
CALL = "<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>"
EXTRAS = {"store", "cache_write_tokens"}  # not in the types of every version of the client
BLOCK = 16  # tokens, which the cache keeps as a whole
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


@pytest.fixture(scope="module")
def shared_stage() -> Iterator[Stage]:
    with staged() as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: Stage) -> Stage:
    shared_stage.script.say("<|channel|>final<|message|>Yes.<|return|>")
    return shared_stage


def ask(stage: Stage, given: Any = "hi", **fields: Any) -> Response:
    reply: Response = stage.api.client.responses.create(
        model=MODEL, input=given, **{"temperature": 0, **fields}
    )
    return reply


ORDER = re.compile(
    r"created in_progress "
    r"(output_item\.added "
    r"(content_part\.added (?P<text>reasoning_text|output_text)\.delta ((?P=text)\.delta )*(?P=text)\.done "
    r"content_part\.done |(function_call_arguments\.delta )*function_call_arguments\.done )"
    r"output_item\.done )*(completed|incomplete|failed) "
)


def streamed(reply: Reply) -> Any:
    """Check a stream's events, each against the client's types and all together; return the response."""
    events = reply.events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert re.findall("^event: response.(.*)$", reply.body.decode(), re.MULTILINE) == kinds
    assert ORDER.fullmatch("".join(f"{kind} " for kind in kinds))
    extras = set().union(*(unknown_fields(ResponseStreamEvent, event) for event in events))
    assert extras <= EXTRAS | {"name", "bytes"}
    created, in_progress, *middle, last = events
    assert created["response"] == in_progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert last["response"].keys() == created["response"].keys()
    assert last["response"]["id"] == created["response"]["id"]
    output = last["response"]["output"]
    for index, item in enumerate(output):
        check_item(item, [event for event in middle if event["output_index"] == index])
    assert len({item["id"] for item in output}) == len(output) == kinds.count("output_item.added")
    return last["response"]


def check_item(item: Any, events: list[Any]) -> None:
    """Check that an item's events add up to it."""
    assert events[0]["item"]["id"] == events[-1]["item"]["id"] == item["id"]
    assert {event.get("item_id", item["id"]) for event in events} == {item["id"]}
    assert events[0]["item"]["status"] == "in_progress" and events[-1]["item"] == item
    deltas = [event for event in events if event["type"].endswith(".delta")]
    text = "".join(event["delta"] for event in deltas)
    if item["type"] == "function_call":
        assert events[-2]["arguments"] == item["arguments"] == text
        return
    [part] = item["content"]
    assert events[-3]["text"] == part["text"] == text and events[-2]["part"] == part
    logprobs = [entry for event in deltas for entry in event.get("logprobs", [])]
    assert events[-3].get("logprobs", []) == part.get("logprobs", []) == logprobs
    assert events[0]["item"]["content"] == [] and events[1]["part"]["text"] == ""


def both(stage: Stage, given: Any = "hi", **fields: Any) -> Any:
    """Ask for a whole answer and a stream; check that they are the same, but for what is new each time."""
    body = {"input": given, "temperature": 0, **fields}
    whole = stage.api.post("responses", **body)
    assert unknown_fields(Response, whole.json) <= EXTRAS
    told = streamed(stage.api.post("responses", **body, stream=True))
    assert nameless(told) == nameless(whole.json)
    return whole.json


def nameless(response: Any) -> Any:
    """Leave out of a response what is another each time."""
    usage = response["usage"] and response["usage"] | {"input_tokens_details": None}
    output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return response | {"id": "", "created_at": 0, "usage": usage, "output": output}


# Items


def test_a_stream_and_a_whole_answer_are_the_same_items(stage: Stage) -> None:
    preamble = "<|start|>assistant<|channel|>commentary<|message|>A moment.<|end|>"
    stage.script.say(f'{THOUGHT}I ask.<|end|>{preamble}{CALL}{{"city": "Bern"}}<|call|>')
    response = both(stage, tools=[WEATHER])
    reasoning, message, call = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "I ask."}]
    assert (message["role"], message["content"][0]["text"]) == ("assistant", "A moment.")
    assert (call["name"], call["arguments"], call["status"]) == ("weather", '{"city": "Bern"}', "completed")
    assert call["call_id"].startswith("call_")
    assert response["status"] == "completed" and response["tools"] == [WEATHER]
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 5}


def test_the_clients_own_helper_follows_the_stream(stage: Stage) -> None:
    stage.script.say(f"{THOUGHT}Hm.<|end|>{FINAL}Yes, it is.<|return|>")
    with stage.api.client.responses.stream(model=MODEL, input="hi") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        response = stream.get_final_response()
    assert snapshots[-1] == response.output_text == "Yes, it is."
    stage.script.say(f"{CALL}{{}}<|call|>")
    with stage.api.client.responses.stream(model=MODEL, input="hi", tools=[WEATHER]) as stream:
        [call] = stream.get_final_response().output
    assert call.type == "function_call" and call.parsed_arguments is None and call.arguments == "{}"


@golden_turns()
def test_a_malformed_turn_becomes_its_messages(stage: Stage, turn: dict[str, Any]) -> None:
    stage.script.say(turn["tokens"])
    response = both(stage, max_output_tokens=max(1, len(turn["tokens"])))
    items = [
        (item["type"], item.get("name"), item["arguments"] if "name" in item else item["content"][0]["text"])
        for item in response["output"]
    ]
    assert items == [
        ("function_call", m["recipient"].removeprefix("functions."), m["text"])
        if m["recipient"]
        else ("reasoning" if m["channel"] == "analysis" else "message", None, m["text"])
        for m in turn["recommended"]
        if m["text"] or m["recipient"]
    ]
    is_whole = not turn["tokens"] or is_ended(turn)
    assert response["status"] == ("completed" if is_whole else "incomplete")
    assert not SPECIAL.search(repr(response))


# What the model is told


def test_instructions_and_roles_become_the_developers(stage: Stage) -> None:
    given = [
        {"role": "developer", "content": "Third."},
        {"role": "system", "content": [{"type": "input_text", "text": "Second."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ]
    ask(stage, given, instructions="First.", reasoning={"effort": "high"})
    heard = stage.script.heard()
    assert "\n\nReasoning: high\n\n" in heard
    assert heard.endswith(
        "<|start|>developer<|message|># Instructions\n\nFirst.\n\nSecond.\n\nThird.<|end|>"
        "<|start|>user<|message|>hi<|end|><|start|>assistant"
    )


def test_text_for_input_is_what_the_user_says(stage: Stage) -> None:
    ask(stage, "Say it.", tools=[WEATHER])
    assert stage.script.heard().endswith("<|start|>user<|message|>Say it.<|end|><|start|>assistant")
    assert "// Tells the weather.\ntype weather = (_: {\ncity: string,\n}) => any;" in stage.script.heard()


@pytest.mark.parametrize("as_dictionaries", [False, True])
def test_a_tool_loop_computes_only_what_is_new(stage: Stage, as_dictionaries: bool) -> None:
    sampled = stage.script.sampled
    header = (
        "<|start|>assistant<|channel|>commentary to=functions.weather code<|message|>"  # not the usual one
    )
    call = sampled(f"{THOUGHT}{'I ask them. ' * 60}<|end|>{header}")
    call += [token for letter in '{ "city": "Bern" }' for token in sampled(letter)] + sampled("<|call|>")
    stage.script.say(call, f"{THOUGHT}It is sunny.<|end|>{FINAL}Sunny.<|return|>", "Yes.")
    given: list[Any] = [{"role": "user", "content": f"The weather, {as_dictionaries}? " * 40}]
    for turn in range(2):
        response = ask(stage, given, tools=[WEATHER])
        given += [item.to_dict() for item in response.output] if as_dictionaries else response.output
        if turn:
            break
        given += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sun"}
            for item in response.output
            if item.type == "function_call"
        ]
    new = sampled(
        "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>sun<|end|><|start|>assistant"
    )
    assert response.output_text == "Sunny."
    assert stage.script.prompts[1] == [*stage.script.prompts[0], *call, *new]
    usage = response.usage
    assert usage and usage.input_tokens - usage.input_tokens_details.cached_tokens <= len(new) + BLOCK
    ask(stage, [*given, {"role": "user", "content": "Sure?"}], tools=[WEATHER])
    heard = stage.script.heard()
    assert "I ask them" not in heard and "It is sunny" not in heard and header in heard
    assert heard.endswith(
        "<|channel|>final<|message|>Sunny.<|end|><|start|>user<|message|>Sure?<|end|><|start|>assistant"
    )


def test_all_items_of_a_turn_come_back_as_one(stage: Stage) -> None:
    message = "<|start|>assistant<|channel|>commentary<|message|>{}<|end|>"
    calls = [
        f"<|start|>assistant<|channel|>commentary to=functions.f{i} json<|message|>{{}}" for i in range(2)
    ]
    stage.script.say(
        f"{THOUGHT}I ask, <|end|><|start|>assistant{THOUGHT}I ask.<|end|>{message.format('A ')}"
        f"{message.format('moment.')}{calls[0]}<|end|>{calls[1]}<|call|>"
    )
    output = ask(stage).output
    assert [item.type for item in output] == [*["reasoning"] * 2, *["message"] * 2, *["function_call"] * 2]
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": item.name}
        for item in output
        if item.type == "function_call"
    ]
    ask(stage, [{"role": "user", "content": "hi"}, *output, *results])
    answers = [
        f"<|start|>functions.f{i} to=assistant<|channel|>commentary<|message|>f{i}<|end|>" for i in range(2)
    ]
    assert stage.script.heard().endswith(
        f"{calls[0]}<|end|>{calls[1]}<|call|>{''.join(answers)}<|start|>assistant"
    )
    ask(stage, [{"role": "user", "content": "hi"}, *output[:4], {"role": "user", "content": "And?"}])
    assert stage.script.heard().endswith(
        f"hi<|end|>{FINAL}A moment.<|end|><|start|>user<|message|>And?<|end|><|start|>assistant"
    )


def test_reasoning_without_its_text_is_passed_over(stage: Stage) -> None:
    thought: Any = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    result = {
        "type": "function_call_output",
        "call_id": "c",
        "output": [{"type": "input_text", "text": "sun"}],
    }
    ask(stage, [{"role": "user", "content": "hi"}, thought, call, result, thought], tools=[WEATHER])
    assert stage.script.heard().endswith(
        f"hi<|end|>{CALL}{{}}<|call|>"
        "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>sun<|end|><|start|>assistant"
    )


# How it ends, and what else it tells


def test_a_limit_leaves_an_answer_incomplete(stage: Stage) -> None:
    stage.script.say("<|channel|>final<|message|>one two three<|return|>")
    response = both(stage, max_output_tokens=5)
    assert (response["status"], response["incomplete_details"]) == (
        "incomplete", {"reason": "max_output_tokens"},
    )  # fmt: skip
    [message] = response["output"]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "one two")
    assert response["max_output_tokens"] == response["usage"]["output_tokens"] == 5


def test_a_stop_string_completes_an_answer(stage: Stage) -> None:
    stage.script.say("<|channel|>final<|message|>one two three<|return|>")
    response = both(stage, stop=" three")
    assert response["status"] == "completed" and response["output"][0]["content"][0]["text"] == "one two"


@pytest.mark.parametrize(
    ("fields", "best"),
    [({"include": ["message.output_text.logprobs"]}, 0), ({"top_logprobs": 3}, 3)],
    ids=["include", "top_logprobs"],
)
def test_logprobs_are_those_of_the_messages_tokens(stage: Stage, fields: dict[str, Any], best: int) -> None:
    preamble = "<|start|>assistant<|channel|>commentary<|message|>A moment.<|end|>"
    stage.script.say(f"{THOUGHT}Hm.<|end|>{preamble}{FINAL}Yes, 😀🫠.<|return|>")
    response = both(stage, **fields)
    for item in response["output"][1:]:
        [part] = item["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]) == part["text"].encode()
        assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {best}
    stage.script.say(f"{THOUGHT}Hm.<|end|>{FINAL}Yes.<|return|>")
    assert both(stage)["output"][1]["content"][0]["logprobs"] == []


def test_what_was_asked_for_is_said_again(stage: Stage) -> None:
    fields: Any = {
        "instructions": "Be brief.", "max_output_tokens": 7, "metadata": {"a": "b"}, "temperature": 0.5,
        "top_p": 0.9, "parallel_tool_calls": False, "reasoning": {"effort": "low"}, "tools": [WEATHER],
        "user": "alice", "store": False, "truncation": "disabled", "tool_choice": "auto",
    }  # fmt: skip
    response = stage.api.post("responses", input="hi", **fields).json
    again = {name: response[name] for name in fields}
    assert again == fields | {"reasoning": {"effort": "low", "summary": None}}
    assert (response["object"], response["model"], response["error"]) == ("response", MODEL, None)


# What cannot be answered

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no input": ({}, "input", "is missing"),
    "null for input": ({"input": None}, "input", "`null`"),
    "an empty list": ({"input": []}, "input", "length >= 1"),
    "an item": ({"input": ["hi"]}, "input[0]", "expected `object`"),
    "an item's kind": ({"input": [{"type": "item_reference", "id": ""}]}, "input[0].type", "'item_reference"),
    "a role": ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'tool'"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
        "input[0].content[0].type", "'input_image', and there is .*; gpt-oss reads text only",
    ),
    "an item's field": ({"input": [{"role": "user", "content": "", "mood": 1}]}, "input[0].mood", "no field"),
    "a result of no call": (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
        "input[0].call_id", "'c' is of no function_call",
    ),
    "a call's name": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "a b", "arguments": ""}]},
        "input[0].name", "regex",
    ),
    "a call's arguments": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "a", "arguments": {}}]},
        "input[0].arguments", "got `object`",
    ),
    "a field of chat's": ({"input": "hi", "max_tokens": 5}, "max_tokens", "no field"),
    "an effort": ({"input": "hi", "reasoning": {"effort": "max"}}, "reasoning.effort", "'max': choose low"),
    "an empty effort": ({"input": "hi", "reasoning": {"effort": ""}}, "reasoning.effort", "'': choose low"),
    "a tool of chat's": (
        {"input": "hi", "tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools[0].function", "no field",
    ),
    "a tool's kind": ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
    "a tool's name": ({"input": "hi", "tools": [WEATHER | {"name": "a b"}]}, "tools[0]", "'a b'"),
    "a tool twice": ({"input": "hi", "tools": [WEATHER, WEATHER]}, "tools[1]", "'weather' is there already"),
    "a tool that is not there": (
        {"input": "hi", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "tide"}},
        "tool_choice", "'tide'",
    ),
    "a format": ({"input": "hi", "text": {"format": {"type": "xml"}}}, "text.format.type", "'xml'"),
    "an include": ({"input": "hi", "include": ["file_search_call.results"]}, "include[0]", "file_search"),
    "many logprobs": ({"input": "hi", "top_logprobs": 21}, "top_logprobs", "<= 20"),
    "a store": ({"input": "hi", "store": True}, "store", "True"),
    "the background": ({"input": "hi", "background": True}, "background", "True"),
    "an earlier response": ({"input": "hi", "previous_response_id": "r"}, "previous_response_id", "is not"),
    "a conversation": ({"input": "hi", "conversation": {"id": "c"}}, "conversation", "is not supported"),
    "a stored prompt": ({"input": "hi", "prompt": {"id": "p"}}, "prompt", "is not supported"),
    "truncation": ({"input": "hi", "truncation": "auto"}, "truncation", "'auto'"),
    "a limit": ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens", ">= 1"),
    "a bias": ({"input": "hi", "logit_bias": {"300000": 1}}, "logit_bias", "300000"),
    "a long prompt": ({"input": "word " * 5000}, "input", "5068 tokens.* context is 4096 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_what_is_wrong(stage: Stage, case: str, stream: bool) -> None:
    fields, param, message = BAD[case]
    reply = stage.api.post("responses", **fields, stream=stream)
    error = reply.json["error"]
    assert (reply.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert re.search(message, error["message"]) and len(error["message"].splitlines()) == 1
    assert ask(stage).output_text == "Yes."


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"[" * 100_000, b'{"input": "\\ud800"}', b'{"input": NaN}']
)
def test_a_body_that_is_no_request_is_told_so(stage: Stage, body: bytes) -> None:
    reply = stage.api.request("POST", "/v1/responses", body)
    assert reply.status == 400 and reply.json["error"]["param"] is None
    assert reply.json["error"]["message"].startswith("the body is")
