"""Harmony against golden tokens, openai-harmony as an oracle, and arbitrary model output."""

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_lite import vocab
from gptoss_lite.errors import RequestError
from gptoss_lite.harmony import (
    BROWSER,
    PYTHON,
    DeveloperContent,
    Message,
    MessageEnd,
    MessageStart,
    Namespace,
    ResponseFormat,
    SystemContent,
    TextDelta,
    TurnParser,
    conversation_from_dict,
    from_chat,
    parse_messages,
    render_messages,
    render_prompt,
    render_training,
    turn_messages,
)
from gptoss_lite.harmony.render import opening
from gptoss_lite.harmony.typescript import to_typescript
from gptoss_lite.tokenizer import Tokenizer

FIXTURES = Path(os.environ.get("GPTOSS_LITE_FIXTURES", Path(__file__).parent / "data"))
GOLDEN = [json.loads(path.read_text("utf-8")) for path in sorted(FIXTURES.glob("harmony/*.json"))]


def golden(kind: str) -> pytest.MarkDecorator:
    cases = [case for file in GOLDEN for case in file[kind]]
    return pytest.mark.parametrize("case", cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.embedded()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """openai-harmony's encoding, offline."""
    harmony = pytest.importorskip("openai_harmony", reason="openai-harmony is the oracle")
    folder = tmp_path_factory.mktemp("vocab")
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(vocab.read_tokens()))
    (folder / "o200k_base.tiktoken").write_bytes(b"".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def feed(parser: TurnParser, tokens: Sequence[int]) -> list[Any]:
    return [event for token in tokens for event in parser.feed(token)] + parser.finish()


def sampled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode text with special tokens in it, as a model would have sampled it."""
    head, *rest = text.split("<|")
    tokens = tokenizer.encode(head)
    for piece in rest:
        name, _, after = piece.partition("|>")
        tokens += [tokenizer.special[f"<|{name}|>"], *tokenizer.encode(after)]
    return tokens


# Golden files


@golden("conversations")
def test_conversation(case: dict[str, Any], tokenizer: Tokenizer) -> None:
    messages = conversation_from_dict(case["conversation"])
    role = case["next_turn_role"]
    prompt, library = case["tokens_drop_before_last_final"], case["tokens"]
    prompt = library if prompt == "same" else prompt
    assert render_prompt(messages, tokenizer, next_role=role) == prompt
    everything = case["tokens_auto_drop_analysis_false"]
    everything = library if everything == "same" else everything
    assert render_prompt(messages, tokenizer, next_role=role, drop_analysis=False) == everything
    training = case["training_tokens"]
    if training == "same_as_tokens_without_next_turn" or prompt != library:
        training = prompt[: -len(opening(role, tokenizer))]
        if messages and (messages[-1].role, messages[-1].channel) == ("assistant", "final"):
            training[-1] = tokenizer.special["<|return|>"]
    assert render_training(messages, tokenizer) == training


@golden("render_errors")
def test_render_error(case: dict[str, Any], tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError) as raised:
        render_prompt(conversation_from_dict(case["conversation"]), tokenizer)
    assert isinstance(raised.value, ValueError)


@golden("streams")
def test_stream(case: dict[str, Any], tokenizer: Tokenizer) -> None:
    if case["kind"] == "conversation":
        messages = list(parse_messages(case["tokens"], tokenizer, role=case["role"]))
    else:
        parser = TurnParser(tokenizer)
        feed(parser, case["tokens"])
        messages = parser.messages
    fields = ("role", "name", "channel", "recipient", "content_type", "text")
    assert [{field: getattr(message, field) for field in fields} for message in messages] == case[
        "recommended"
    ]


# Rendering against openai-harmony


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    text = st.sampled_from(["", "dup", "A value.", "two\nlines", "null", 'quo"te', "Größe"])
    value: st.SearchStrategy[Any] = st.sampled_from(
        [None, True, 0, -1, 2.5, -0.0, 3e-5, 1e-7, 1e16, 10**19, 10**25, "a", "ä\n", [1, "a"], {"k": {}}, []]
    )
    kinds: list[Any] = ["object"] * 4 + ["array"] * 2 + ["string"] * 2
    kinds += ["number", "integer", "boolean", "null", "weird", ["integer", "null"], ["string", 1], [], 5]
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(kinds),
            "properties": st.dictionaries(st.sampled_from(["a", "b c", "é"]), inner, max_size=3),
            "required": st.sampled_from([["a"], ["a", "é", 1], "a", None]),
            "items": inner,
            "oneOf": st.lists(inner, max_size=3) | st.just("no list"),
            "anyOf": st.just([{"type": "string"}]),
            "enum": st.sampled_from([["a", "b"], ["null"], [1, 2], ["x", None], [], "no list"]),
            "description": text | st.just(3),
            "title": text,
            "examples": st.sampled_from([["e1", "e2"], [1], [], "no list"]),
            "default": value,
            "nullable": st.sampled_from([True, False, "true"]),
        },
    )


SCHEMAS = objects(st.recursive(st.just({}) | st.sampled_from([True, None, 5]), objects, max_leaves=8))


@given(SCHEMAS)
@settings(deadline=None, database=None, max_examples=300)
def test_typescript_equals_openai_harmony(oracle: Any, schema: dict[str, Any]) -> None:
    import openai_harmony as harmony

    tool = harmony.ToolDescription.new("f", "", schema)
    content = harmony.DeveloperContent.new().with_function_tools([tool])
    message = harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, content)
    text = oracle.decode_utf8(oracle.render(message))
    assert f"type f = (_: {to_typescript(schema)}) => any;\n" in text


def test_built_in_tools_equal_openai_harmony() -> None:
    harmony = pytest.importorskip("openai_harmony", reason="openai-harmony is the oracle")
    namespaces = {tool.name: tool.model_dump() for tool in (
        harmony.ToolNamespaceConfig.browser(), harmony.ToolNamespaceConfig.python()
    )}  # fmt: skip
    data = {"role": "system", "content": [{"type": "system_content", "tools": namespaces}]}
    (message,) = conversation_from_dict({"messages": [data]})
    assert isinstance(message.content[0], SystemContent)
    assert message.content[0].tools == (BROWSER, PYTHON)


# Parsing


HEADER_WORDS = [
    " to=",
    "functions.f",
    " json",
    "assistant",
    "analysis",
    "final",
    "commentary",
    '{"a":1}',
    " é😀 ",
]

MODEL_OUTPUT = st.lists(
    st.sampled_from(sorted(vocab.SPECIAL_TOKENS.values()))
    | st.sampled_from(HEADER_WORDS)
    | st.integers(0, 255)
    | st.integers(-3, 201_100)
    | st.sampled_from([-(2**70), 2**31, 2**70, 200_500]),
    max_size=40,
)


def as_tokens(output: Sequence[int | str], tokenizer: Tokenizer) -> list[int]:
    return [i for piece in output for i in ([piece] if isinstance(piece, int) else tokenizer.encode(piece))]


def has_special(text: str | None) -> bool:
    return text is not None and "<|" in text.replace("<|constrain|>", "", 1)


@given(MODEL_OUTPUT)
@settings(deadline=None, database=None, max_examples=500)
def test_any_turn_is_parsed_without_a_leak(tokenizer: Tokenizer, output: list[int | str]) -> None:
    tokens = as_tokens(output, tokenizer)
    parser = TurnParser(tokenizer)
    events = feed(parser, tokens)

    texts: list[str] = []
    start = MessageStart(None, None, None)
    for event in events:
        match event:
            case MessageStart() as start:
                texts.append("")
            case TextDelta(text, channel, recipient):
                texts[-1] += text
                assert text and (channel, recipient) == (start.channel, start.recipient)
            case MessageEnd(message):
                assert (message.channel, message.recipient) == (start.channel, start.recipient)
    assert texts == [message.text for message in parser.messages]
    assert [event.message for event in events if isinstance(event, MessageEnd)] == parser.messages

    for message in parser.messages:
        assert message.role == "assistant"
        assert message.channel in (None, "analysis", "commentary", "final")
        assert not has_special(message.text) and not has_special(message.recipient)
        assert not has_special(message.content_type)
    ends = {tokenizer.special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>")}
    assert parser.finished == bool(ends & set(tokens))
    assert parser.feed(0) == [] if parser.finished else True


@given(MODEL_OUTPUT)
@settings(deadline=None, database=None, max_examples=300)
def test_any_conversation_is_parsed_and_renders_again(tokenizer: Tokenizer, output: list[int | str]) -> None:
    messages = parse_messages(as_tokens(output, tokenizer), tokenizer)
    rendered = render_messages(messages, tokenizer, drop_analysis=False)
    again = parse_messages(rendered, tokenizer)
    assert [(m.role, m.text) for m in again] == [(m.role, m.text) for m in messages]


def test_a_rendered_conversation_parses_to_itself(tokenizer: Tokenizer) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": "<|end|>"}'}}
    conversation = from_chat(
        [
            {"role": "user", "name": "alice", "content": "hi <|return|>"},
            {"role": "assistant", "reasoning": "think", "content": "a moment", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "😀"},
            {"role": "assistant", "content": "done"},
        ]
    )[1:]
    assert (
        parse_messages(render_messages(conversation, tokenizer), tokenizer)
        == conversation[:1] + conversation[2:]
    )
    assert (
        parse_messages(render_messages(conversation, tokenizer, drop_analysis=False), tokenizer)
        == conversation
    )


def test_a_turn_streams_channel_recipient_and_whole_characters(tokenizer: Tokenizer) -> None:
    parser = TurnParser(tokenizer)
    emoji = [next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([b])) for b in "😀".encode()]
    tokens = sampled(tokenizer, "<|channel|>analysis<|message|>") + emoji
    tokens += sampled(
        tokenizer, "<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>x"
    )
    assert feed(parser, tokens) == [
        MessageStart("analysis", None, None),
        TextDelta("😀", "analysis", None),
        MessageEnd(Message("assistant", ("😀",), channel="analysis")),
        MessageStart("commentary", "functions.f", "json"),
        TextDelta("{}", "commentary", "functions.f"),
        MessageEnd(Message("assistant", ("{}",), None, "commentary", "functions.f", "json")),
    ]
    assert parser.finished and parser.end_token == tokenizer.special["<|call|>"]
    assert parser.repairs == ["dropped tokens after the end of the turn"]


def test_channel_and_recipient_are_known_while_a_message_is_written(tokenizer: Tokenizer) -> None:
    parser = TurnParser(tokenizer)
    for token in sampled(tokenizer, "<|channel|>commentary to=functions.f<|message|>"):
        assert (parser.channel, parser.recipient) == (None, None)
        parser.feed(token)
    assert (parser.channel, parser.recipient) == ("commentary", "functions.f")


MALFORMED = {
    # rule 1
    "assistantassistant<|channel|>final<|message|>x<|return|>": ("final", None, None, "x"),
    # rule 2
    "<|channel|>final.<|message|>x<|return|>": ("final", None, None, "x"),
    "<|channel|>unknown<|message|>x<|return|>": ("final", None, None, "x"),
    "<|channel|> to=functions.f commentary<|message|>x<|call|>": ("commentary", "functions.f", None, "x"),
    # rule 3
    "<|channel|>commentary to=<|channel|>commentary<|message|>x<|call|>": ("commentary", None, None, "x"),
    "<|channel|>commentary to=ls<|channel|>commentary<|message|>x<|call|>": ("commentary", "ls", None, "x"),
    "<|channel|>commentaryto=functions.f<|message|>x<|call|>": ("commentary", "functions.f", None, "x"),
    # rule 4
    "<|channel|>final json code<|message|>x<|return|>": ("final", None, "code", "x"),
    "<|channel|>final <|constrain|> json<|message|>x<|return|>": ("final", None, "<|constrain|>json", "x"),
    "<|channel|>final code <|constrain|><|message|>x<|return|>": ("final", None, "code", "x"),
    # rule 6
    '<|channel|>commentary to=f json{"a":1}<|call|>': ("commentary", "f", "json", '{"a":1}'),
    'to=functions.f json{"a":1}<|call|>': ("final", "functions.f", "json", '{"a":1}'),
    'to=functions.f{"a": "code to=g"}<|call|>': ("final", "functions.f", None, '{"a": "code to=g"}'),
    '<|channel|>commentary to=functions.f <|constrain|>json{"a":1}<|call|>': (
        "commentary", "functions.f", "<|constrain|>json", '{"a":1}',
    ),
    "<|channel|>analysisWe write code<|end|>": ("analysis", None, None, "We write code"),
    "<|channel|>analysis I must refuse": ("analysis", None, None, "I must refuse"),
    "no header at all": ("final", None, None, "no header at all"),
    # rule 7
    "<|start|><|start|>assistant<|channel|>final<|message|>x<|return|>": ("final", None, None, "x"),
    "<|end|>assistant<|channel|>final<|message|>x<|return|>": ("final", None, None, "x"),
    "<|end|> to=functions.f json<|message|>x<|call|>": (None, "functions.f", "json", "x"),
    # rule 8
    "<|channel|>final<|message|>a<|channel|>b<|message|>c<|reserved_200500|><|startoftext|>d<|return|>": (
        "final", None, None, "abcd",
    ),
    # rule 9
    "<|channel|>final<|message|>cut off": ("final", None, None, "cut off"),
}  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_message_is_read(text: str, tokenizer: Tokenizer) -> None:
    parser = TurnParser(tokenizer)
    feed(parser, sampled(tokenizer, text))
    (message,) = parser.messages
    assert (message.channel, message.recipient, message.content_type, message.text) == MALFORMED[text]


def test_specials_spelled_in_ordinary_text_stay_text(tokenizer: Tokenizer) -> None:
    tokens = sampled(tokenizer, "<|channel|>final<|message|>") + tokenizer.encode("<|return|>")
    parser = TurnParser(tokenizer)
    feed(parser, tokens)
    assert parser.messages[0].text == "<|return|>" and not parser.finished


# Replay


def test_a_replayed_turn_keeps_the_sampled_tokens(tokenizer: Tokenizer) -> None:
    turn = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{ }"
    tokens = sampled(tokenizer, turn)
    tokens[-1:] = [tokenizer.encode(" ")[0], tokenizer.encode("}")[0]]  # not how the text would be encoded
    start = opening("assistant", tokenizer)
    messages = turn_messages([*tokens, tokenizer.special["<|call|>"]], tokenizer)
    assert render_messages(messages, tokenizer) == [*start, *tokens, tokenizer.special["<|call|>"]]
    for terminator in ("<|return|>", "<|endoftext|>", "<|end|>"):
        messages = turn_messages([*tokens, tokenizer.special[terminator]], tokenizer)
        assert render_messages(messages, tokenizer) == [*start, *tokens, tokenizer.special["<|end|>"]]
    messages = turn_messages(tokens, tokenizer)
    assert render_messages(messages, tokenizer) == [*start, *tokens, tokenizer.special["<|call|>"]]


def test_old_analysis_is_cut_out_of_a_replay(tokenizer: Tokenizer) -> None:
    analysis = "<|channel|>analysis<|message|>hm<|end|>"
    final = "<|channel|>final<|message|>yes"
    turn = turn_messages(sampled(tokenizer, f"{analysis}<|start|>assistant{final}<|return|>"), tokenizer)
    prompt = render_prompt(from_chat([*turn, {"role": "user", "content": "and?"}])[1:], tokenizer)
    expected = f"<|start|>assistant{final}<|end|><|start|>user<|message|>and?<|end|><|start|>assistant"
    assert prompt == sampled(tokenizer, expected)


def test_a_message_without_start_is_rendered_afresh(tokenizer: Tokenizer) -> None:
    text = "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b<|return|>"
    analysis, final = turn_messages(sampled(tokenizer, text), tokenizer)
    assert analysis.tokens is not None and final.tokens is None
    expected = "<|start|>assistant<|channel|>final<|message|>b<|end|>"
    assert render_messages([final], tokenizer) == sampled(tokenizer, expected)


# From chat


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_a_chat_becomes_a_conversation(tokenizer: Tokenizer) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"Bern"}'},
    }
    conversation = from_chat(
        [
            {"role": "developer", "content": "Developer."},
            {
                "role": "system",
                "content": [{"type": "text", "text": "Sys"}, {"type": "text", "text": "tem."}],
            },
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "reasoning_content": "Call it.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        reasoning_effort="high",
        instructions="Option.",
        tools=[WEATHER],
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "description": "An answer",
                "schema": {"type": "object", "b": 1, "a": []},
            },
        },
        date="2025-06-28",
    )
    assert (
        tokenizer.decode(render_prompt(conversation, tokenizer))
        == """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.<|end|><|start|>developer<|message|># Instructions

Option.

System.

Developer.

# Tools

## functions

namespace functions {

// Tells the weather.
type weather = (_: {
city: string,
}) => any;

} // namespace functions

# Response Formats

## answer

// An answer
{"type":"object","b":1,"a":[]}<|end|><|start|>user<|message|>Weather?<|end|>\
<|start|>assistant<|channel|>analysis<|message|>Call it.<|end|>\
<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"city":"Bern"}<|call|>\
<|start|>functions.weather to=assistant<|channel|>commentary<|message|>sunny<|end|><|start|>assistant"""  # noqa: E501
    )


def test_a_schema_nested_too_deeply_is_refused(tokenizer: Tokenizer) -> None:
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(RequestError, match="too deeply"):
        render_prompt(from_chat([], tools=[tool]), tokenizer)


def test_a_plain_chat_has_no_developer_message() -> None:
    system, user = from_chat([{"role": "user", "content": "hi"}], date="2025-06-28")
    assert system == Message("system", (SystemContent(current_date="2025-06-28"),))
    assert user == Message("user", ("hi",))


def test_built_in_tools_go_into_the_system_message() -> None:
    system, *rest = from_chat([], tools=[{"type": "browser"}, {"type": "python"}], date="2025-06-28")
    assert isinstance(system.content[0], SystemContent)
    assert system.content[0].tools == (BROWSER, PYTHON) and not rest


def test_json_object_is_a_response_format() -> None:
    (_, developer) = from_chat([], response_format={"type": "json_object"})
    content = developer.content[0]
    assert isinstance(content, DeveloperContent)
    assert content.response_format == ResponseFormat("json_object", {"type": "object"}, "Any JSON object.")
    assert len(from_chat([], response_format={"type": "text"})) == 1


USER = {"role": "user", "content": "hi"}
BAD_CHATS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no list": ("hi", {}, "messages is 'hi'"),
    "no object": (["hi"], {}, "messages[0] is 'hi'"),
    "no role": ([{"content": "hi"}], {}, "messages[0] has no 'role'"),
    "role": ([USER, {"role": "critic", "content": "hi"}], {}, "messages[1]: role is 'critic'"),
    "role type": ([{"role": 5, "content": "hi"}], {}, "'role' is 5"),
    "no content": ([{"role": "user"}], {}, "messages[0] has no 'content'"),
    "content type": ([{"role": "user", "content": 5}], {}, "'content' is 5"),
    "image": ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, "'image_url'"),
    "part": ([{"role": "user", "content": ["hi"]}], {}, "messages[0].content[0] is 'hi'"),
    "part text": ([{"role": "user", "content": [{"type": "text"}]}], {}, "has no 'text'"),
    "empty assistant": ([{"role": "assistant", "content": None}], {}, "none of 'content'"),
    "reasoning": ([{"role": "assistant", "reasoning": {}}], {}, "'reasoning' is {}"),
    "calls": ([{"role": "assistant", "tool_calls": "f"}], {}, "'tool_calls' is 'f'"),
    "call": ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], {}, "tool_calls[0] has no 'function'"),
    "arguments": (
        [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": 5}}]}],
        {},
        "'arguments' is 5",
    ),
    "call id": ([{"role": "tool", "tool_call_id": "9", "content": ""}], {}, "'tool_call_id' '9'"),
    "no call id": ([{"role": "tool", "content": ""}], {}, "has no 'tool_call_id'"),
    "effort": ([USER], {"reasoning_effort": "max"}, "reasoning_effort is 'max': choose low, medium or high"),
    "effort type": ([USER], {"reasoning_effort": ["low"]}, "reasoning_effort is ['low']"),
    "tools": ([USER], {"tools": {"type": "function"}}, "tools is"),
    "tool type": ([USER], {"tools": [{"type": "sandbox"}]}, "tools[0]: type is 'sandbox'"),
    "tool name": (
        [USER],
        {"tools": [{"type": "function", "function": {"name": "a b\n"}}]},
        "tools[0].function: name",
    ),
    "tool twice": ([USER], {"tools": [WEATHER, WEATHER]}, "tools[1].function: a tool named 'weather'"),
    "parameters": (
        [USER],
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "'parameters' is []",
    ),
    "format": ([USER], {"response_format": {"type": "xml"}}, "response_format: type is 'xml'"),
    "format schema": (
        [USER],
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema has no 'schema'",
    ),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_request_names_the_culprit(name: str) -> None:
    messages, options, culprit = BAD_CHATS[name]
    with pytest.raises(RequestError) as raised:
        from_chat(messages, **options)
    assert culprit in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("message", "culprit"),
    [
        ({"role": "user", "content": None}, "'content' is None"),
        ({"role": "user", "content": [{"type": "image"}]}, "type is 'image'"),
        ({"role": "system", "content": [{"type": "system_content", "reasoning_effort": "Max"}]}, "'max'"),
        ({"role": "system", "content": [{"type": "system_content", "tools": []}]}, "'tools' is []"),
        ({"role": "system", "content": [{"type": "system_content", "tools": {"a": {}}}]}, "has no 'tools'"),
    ],
)
def test_a_bad_conversation_names_the_culprit(message: dict[str, Any], culprit: str) -> None:
    with pytest.raises(RequestError) as raised:
        conversation_from_dict({"messages": [message]})
    assert culprit in str(raised.value)


def test_namespaces_are_rendered_in_order_of_their_names(tokenizer: Tokenizer) -> None:
    system = SystemContent(
        None, None, None, None, (Namespace("b", description="B"), Namespace("a")), channels=()
    )
    text = tokenizer.decode(render_messages([Message("system", (system,))], tokenizer))
    assert text == "<|start|>system<|message|># Tools\n\n## a\n\n\n## b\n\nB<|end|>"
