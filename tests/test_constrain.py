"""Constrained turns: whatever the logits say, the turn keeps to its rules."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptoss_lite as gl
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.constrain import Grammar, GrammarCompiler, TurnConstraint, TurnRules
from gptoss_lite.errors import GptOssError, RequestError
from gptoss_lite.harmony import Message, TurnParser, from_chat, render_messages, render_prompt
from gptoss_lite.harmony.parse import TURN_ENDS
from gptoss_lite.harmony.render import opening
from gptoss_lite.stream import TurnReader
from gptoss_lite.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(gl.__file__).parent / "demo"
TEXT = {"type": "string"}


def strict(**properties: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": strict(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 150}, ok={"type": "boolean"}),
    "enum": {"enum": ["red", "gr\u00fcn", "\U0001f642 blue", 7, None, [1, {"a": "b"}]]},
    "nested": strict(at=strict(street=TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"}), n=TEXT),
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    "any of": {"anyOf": [strict(kind={"const": "a"}, x={"type": "integer"}), {"type": "null"}, TEXT]},
    "unicode": strict(**{"\u00fcber": {"const": "\u65e5\u672c"}, "\U0001f642": TEXT}),
    "optional": {"type": "object", "properties": {"a": TEXT}, "additionalProperties": False},
    "recursive": {
        "$defs": {
            "n": strict(v={"type": "integer"}, rest={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})
        },
        "$ref": "#/$defs/n",
    },
    "all of": {"allOf": [strict(a={"type": "integer"}), {"properties": {"a": {"minimum": 5, "maximum": 9}}}]},
    "anything": {"type": "object"},
}
BOMB = {"allOf": [{"type": "integer", "multipleOf": factor} for factor in (97, 101, 103, 107)]}
UNSOUND: dict[str, tuple[Any, str]] = {
    "unknown type": ({"type": "strin"}, "strin"),
    "unsupported word": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "options of its own": ({"uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    "overlapping cases": ({"oneOf": [{"type": "object"}, {"type": "object", "title": "x"}]}, "oneOf"),
    "no regex": ({"type": "string", "pattern": "(["}, "unclosed"),
    "reference to itself": ({"$ref": "#"}, "no text satisfies it"),
    "loop": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no"),
    "reference to nothing": ({"$ref": "#/$defs/x"}, "/$defs/x"),
    "reference to elsewhere": ({"$ref": "http://example.com/schema.json"}, "example.com"),
    "contradiction": ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
    "gigantic": ({"enum": [f"value {i}" for i in range(10_000)]}, "characters: at most 65,536"),
    "no number": ({"const": float("nan")}, "float"),
    "no JSON": ({"const": {1, 2}}, "set"),
    "no object": (True, "object"),
}  # fmt: skip


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = TEXT
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def fits(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> bool:
    """Validate what SCHEMAS has of JSON schema."""
    root = root or schema
    types: dict[str, Callable[[Any], bool]] = {
        "object": lambda v: isinstance(v, dict),
        "array": lambda v: isinstance(v, list),
        "string": lambda v: isinstance(v, str),
        "integer": lambda v: type(v) is int,
        "number": lambda v: type(v) in (int, float),
        "boolean": lambda v: isinstance(v, bool),
        "null": lambda v: v is None,
    }

    def below(key: str, inner: Any) -> bool:
        properties = schema.get("properties", {})
        if key not in properties:
            return bool(schema.get("additionalProperties", True))
        return fits(inner, properties[key], root)

    rules: dict[str, Callable[[Any], bool]] = {
        "$ref": lambda ref: fits(value, root["$defs"][ref.removeprefix("#/$defs/")], root),
        "type": lambda name: types[name](value),
        "enum": lambda values: value in values,
        "const": lambda wanted: value == wanted,
        "anyOf": lambda cases: any(fits(value, case, root) for case in cases),
        "allOf": lambda cases: all(fits(value, case, root) for case in cases),
        "minimum": lambda least: value >= least,
        "maximum": lambda most: value <= most,
        "minItems": lambda least: len(value) >= least,
        "maxItems": lambda most: len(value) <= most,
        "pattern": lambda pattern: re.search(pattern, value) is not None,
        "items": lambda items: all(fits(item, items, root) for item in value),
        "required": lambda keys: set(keys) <= value.keys(),
        "properties": lambda _: all(below(key, inner) for key, inner in value.items()),
    }
    return all(rule(schema[word]) for word, rule in rules.items() if word in schema)


class Writer:
    """A model that writes at random; it likes to end what it has begun, if it has a `wish` for it."""

    def __init__(self, tokenizer: Tokenizer, wish: Mapping[str, float] | None = None, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        size = tokenizer.vocab_size
        self._random = np.random.default_rng(seed)
        self._noise = self._random.gumbel(size=2 * size).astype(np.float32)
        self._bonus = np.zeros(size, np.float32)
        close = np.log(size) - 1  # a little less likely than all others together
        closing = {**dict.fromkeys(("<|end|>", "<|return|>", "<|call|>", '"', "}", "]", ","), close)}
        for text, liking in (closing if wish is None else wish).items():
            self._bonus[tokenizer.special.get(text) or tokenizer.encode(text)[0]] = liking

    def logits(self) -> np.ndarray:
        start = int(self._random.integers(self.tokenizer.vocab_size))
        return self._noise[start : start + self.tokenizer.vocab_size] + self._bonus

    def write(self, rules: TurnRules, begin: Sequence[int] = (), limit: int = 1500) -> list[int]:
        """Write a turn to its end."""
        prompt = [*self.tokenizer.encode("Hello."), *opening("assistant", self.tokenizer)]
        constraint = TurnConstraint(rules, self.tokenizer, len(prompt))
        ends = {self.tokenizer.special[name] for name in TURN_ENDS}
        tokens = list(begin)
        while not ends & set(tokens[-1:]):
            assert len(tokens) < limit, self.tokenizer.decode(tokens[-100:])
            logits = constraint((*prompt, *tokens), self.logits())
            tokens.append(int(logits.argmax()))
            assert np.isfinite(logits[tokens[-1]])
        return tokens

    def turn(self, rules: TurnRules) -> list[Message]:
        """Write a turn, which needs no repair, and return its messages."""
        return read(self.tokenizer, self.write(rules))


def read(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Message]:
    parser = TurnParser(tokenizer)
    for token in tokens:
        parser.feed(token)
    assert parser.finished and not parser.repairs, (parser.repairs, tokenizer.decode(tokens))
    return parser.messages


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode text with special tokens in it."""
    parts = re.split(r"(<\|\w+\|>)", text)
    return [
        token
        for part in parts
        for token in ([tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part))
    ]


def allowed(rules: TurnRules, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids that may follow on the beginning of a turn."""
    tokens = spelled(tokenizer, text)
    logits = TurnConstraint(rules, tokenizer, 0)(tokens, np.zeros(tokenizer.vocab_size, np.float32))
    return np.flatnonzero(logits == 0)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(DEMO, open_checkpoint(DEMO).config.vocab_size)


@pytest.fixture(scope="module")
def demo_compiler(demo: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(demo)


@pytest.fixture(scope="module", params=["demo", "embedded"])
def compiler(request: pytest.FixtureRequest) -> tuple[Tokenizer, GrammarCompiler]:
    """A small vocabulary that spells words in pieces, and that of gpt-oss."""
    if request.param == "demo":
        return request.getfixturevalue("demo"), request.getfixturevalue("demo_compiler")
    tokenizer = Tokenizer.embedded()
    return tokenizer, GrammarCompiler(tokenizer)


# Grammars


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_follows_its_schema(compiler: tuple[Tokenizer, GrammarCompiler], name: str) -> None:
    tokenizer, grammars = compiler
    rules = TurnRules(content=grammars.compile(SCHEMAS[name]), calls={})
    writer = Writer(tokenizer)
    reasoned = ""
    for _ in range(8):
        *before, answer = writer.turn(rules)
        assert {message.channel for message in before} <= {"analysis"}
        assert answer.channel == "final" and answer.recipient is None
        assert fits(json.loads(answer.text), SCHEMAS[name]), answer.text
        reasoned += "".join(message.text for message in before)
    assert len(reasoned) > 20


def test_any_object_will_do_where_no_schema_is_given(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    writer = Writer(demo)
    answers = [writer.turn(TurnRules(demo_compiler.json_object(), {}))[-1].text for _ in range(20)]
    objects = [json.loads(answer) for answer in answers]
    assert all(isinstance(value, dict) for value in objects) and any(objects)


def test_a_text_ends_where_its_grammar_is_complete_and_nowhere_else(
    compiler: tuple[Tokenizer, GrammarCompiler],
) -> None:
    tokenizer, grammars = compiler
    head = "<|channel|>final <|constrain|>json<|message|>"
    rules = TurnRules(content=grammars.compile(strict(a={"type": "integer"})))
    end = tokenizer.special["<|return|>"]
    assert allowed(rules, tokenizer, head + '{"a": 1}').tolist() == [end]
    assert not tokenizer.special_ids & set(allowed(rules, tokenizer, head + '{"a": 1').tolist())
    number = allowed(
        TurnRules(content=grammars.compile({"type": "integer"})), tokenizer, head + "12"
    ).tolist()
    assert set(number) & tokenizer.special_ids == {end} and tokenizer.encode("3")[0] in number
    called = TurnRules(calls={"f": grammars.compile(strict(a={"type": "integer"}))})
    head = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    assert allowed(called, tokenizer, head + '{"a":1}').tolist() == [tokenizer.special["<|call|>"]]


def test_blanks_between_the_parts_of_a_text_end(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    likes_blanks = dict.fromkeys((" ", "\n", "  ", "\t"), 50.0)
    rules = TurnRules(demo_compiler.compile(strict(a={"enum": [1]}, b={"enum": [2]})), {}, reasoning_tokens=0)
    text = Writer(demo, likes_blanks).turn(rules)[-1].text
    blanks = re.findall(r"\s+", text)
    assert len(blanks) == 8 and max(map(len, blanks)) <= 41
    assert "\t" not in text


@pytest.mark.parametrize("name", UNSOUND)
def test_a_schema_that_cannot_be_compiled_is_refused(demo_compiler: GrammarCompiler, name: str) -> None:
    schema, reason = UNSOUND[name]
    with pytest.raises(RequestError) as raised:
        demo_compiler.compile(schema, "response_format")
    message = str(raised.value)
    assert message.startswith("response_format") and reason in message
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_schema_may_not_be_nested_too_deeply(demo_compiler: GrammarCompiler, depth: int) -> None:
    demo_compiler.compile(nested(40))
    with pytest.raises(RequestError, match=r"recursion limit|nested too deeply"):
        demo_compiler.compile(nested(depth))


def test_a_schema_that_would_take_minutes_is_given_up(
    demo_compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "the schema cannot be compiled: it takes too much time or memory"
    with pytest.raises(RequestError, match=refused):
        demo_compiler.compile(BOMB)
    monkeypatch.setattr("subprocess.run", None)  # it is not tried again
    with pytest.raises(RequestError, match=refused):
        demo_compiler.compile(BOMB)


def test_only_schemas_that_combine_others_are_tried_first(
    demo_compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, part = {"type": "string", "pattern": "a"}, {"type": "object", "properties": {"a": TEXT}}
    definitions = {"$defs": {"p": pattern, "o": part}}
    combined: list[dict[str, Any]] = [
        {"allOf": [pattern, pattern]},
        {**definitions, "type": "array", "items": {"$ref": "#/$defs/p", "pattern": "b"}},
        {**definitions, "$ref": "#/$defs/o", "properties": {"a": pattern}},
        {**pattern, "anyOf": [pattern, {"format": "date"}]},
        {"type": "object", "patternProperties": {"^a": pattern}},
    ]
    for schema in combined:
        demo_compiler.compile(schema)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess((), 1))
    for schema in combined:
        with pytest.raises(RequestError, match="too much"):
            demo_compiler.compile({**schema, "title": "not tried before"})
    demo_compiler.compile({**definitions, "anyOf": [{"$ref": "#/$defs/p"}, {"$ref": "#/$defs/o"}]})


def test_a_grammar_that_becomes_too_costly_fails_its_request(
    demo: Tokenizer, demo_compiler: GrammarCompiler
) -> None:
    rules = TurnRules(demo_compiler.compile({"type": "string", "pattern": r"^(\p{L}{1,1000}){1,1000}$"}))
    with pytest.raises(RequestError, match="the grammar of the text stopped: lexer error"):
        for length in range(100):
            allowed(rules, demo, '<|channel|>final<|message|>"' + "ab" * length)


def test_without_llguidance_the_extra_is_named(demo: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GptOssError, match=r"gptoss-lite\[serve\]"):
        GrammarCompiler(demo)


# Turns


@pytest.fixture(scope="module")
def functions(compiler: tuple[Tokenizer, GrammarCompiler]) -> dict[str, Grammar | None]:
    """Functions whose names begin with one another."""
    _, grammars = compiler
    return {
        "get_weather": grammars.compile(SCHEMAS["nested"]),
        "get": grammars.compile(SCHEMAS["flat"]),
        "get_weather.v-2": grammars.compile(SCHEMAS["array"]),
        "free": None,
    }


def check_call(message: Message) -> None:
    schemas = {"get": "flat", "get_weather": "nested", "get_weather.v-2": "array"}
    assert message.recipient is not None and message.channel in ("commentary", "analysis")
    name = message.recipient.removeprefix("functions.")
    assert name == "free" or fits(json.loads(message.text), SCHEMAS[schemas[name]])


def test_a_required_call_is_made(
    compiler: tuple[Tokenizer, GrammarCompiler], functions: Mapping[str, Grammar | None]
) -> None:
    tokenizer, _ = compiler
    writer = Writer(tokenizer)
    called, content_types, orders = set(), set(), set()
    for _ in range(60):
        tokens = writer.write(TurnRules(calls=functions, answer=False))
        *before, call = read(tokenizer, tokens)
        assert tokens[-1] == tokenizer.special["<|call|>"]
        assert [(m.channel, m.recipient) for m in before] in ([], [("analysis", None)])
        check_call(call)
        called.add(call.recipient)
        content_types.add(call.content_type)
        header = tokenizer.decode(tokens).rpartition("<|message|>")[0].rpartition("assistant")[2]
        orders.add(header.startswith(" to="))
    assert called >= {f"functions.{name}" for name in ("get", "get_weather", "free")}
    assert content_types == {None, "json", "code", "<|constrain|>json"}
    assert orders == {True, False}


def test_a_named_function_is_the_only_one_called(
    compiler: tuple[Tokenizer, GrammarCompiler], functions: Mapping[str, Grammar | None]
) -> None:
    tokenizer, _ = compiler
    rules = TurnRules(calls={"get_weather": functions["get_weather"]}, answer=False)
    writer = Writer(tokenizer)
    for _ in range(10):
        call = writer.turn(rules)[-1]
        assert call.recipient == "functions.get_weather"
        check_call(call)


def test_a_turn_that_may_call_may_as_well_answer(
    compiler: tuple[Tokenizer, GrammarCompiler], functions: Mapping[str, Grammar | None]
) -> None:
    tokenizer, grammars = compiler
    writer = Writer(tokenizer)
    turns = [writer.turn(TurnRules(calls=functions)) for _ in range(60)]
    for *before, last in turns:
        assert all(m.recipient is None and m.channel in ("analysis", "commentary") for m in before)
        if last.recipient is None:
            assert last.channel == "final"
        else:
            check_call(last)
    assert {last.channel for *_, last in turns} == {"final", "commentary", "analysis"}
    assert any(message.channel == "commentary" for *before, _ in turns for message in before)
    # with a form for the answer, a preamble would make two of it
    rules = TurnRules(grammars.compile(SCHEMAS["enum"]), functions)
    turns = [writer.turn(rules) for _ in range(30)]
    assert {tuple(message.channel for message in before) for *before, _ in turns} == {(), ("analysis",)}
    assert {last.recipient is None for *_, last in turns} == {True, False}


def test_no_function_is_called_where_none_may_be(demo: Tokenizer) -> None:
    writer = Writer(demo)
    messages = [message for _ in range(40) for message in writer.turn(TurnRules(calls={}))]
    assert all(message.recipient is None for message in messages)
    assert {message.channel for message in messages} == {"analysis", "final"}


def test_without_rules_a_turn_is_well_formed_and_calls_whom_it_likes(demo: Tokenizer) -> None:
    likes = {
        **dict.fromkeys(("<|end|>", "<|return|>", "<|call|>", "<|message|>", "<|channel|>"), 7.0),
        " to": 9.0,
    }
    writer = Writer(demo, likes)
    turns = [writer.write(TurnRules()) for _ in range(60)]
    lasts = [read_any(demo, tokens)[-1] for tokens in turns]
    recipients = {message.recipient for message in lasts}
    assert len(recipients) > 10 and None in recipients
    for header in (
        "<|channel|>analysis to=python code",
        "<|channel|>commentary to=browser.search <|constrain|>json",
        " to=functions.get_weather<|channel|>commentary <|constrain|>json",
        " to=functions.get_weather<|channel|>commentary code",
    ):
        tokens = writer.write(TurnRules(), spelled(demo, f"{header}<|message|>print(1)"))
        message = read(demo, tokens)[0]
        assert (
            f"to={message.recipient}" in header and message.recipient and message.text.startswith("print(1)")
        )


def read_any(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Message]:
    """Read a turn whose recipients may be nonsense."""
    parser = TurnParser(tokenizer)
    for token in tokens:
        parser.feed(token)
    assert parser.finished and all(note.startswith("ignored") for note in parser.repairs)
    return parser.messages


def test_headers_are_those_that_rendering_writes(
    compiler: tuple[Tokenizer, GrammarCompiler], functions: Mapping[str, Grammar | None]
) -> None:
    tokenizer, _ = compiler
    messages = [
        Message("assistant", ("Hm.",), channel="analysis"),
        Message("assistant", ("Let me see.",), channel="commentary"),
        Message(
            "assistant", ("[1, 2]",), channel="commentary", recipient="functions.get_weather.v-2",
            content_type="<|constrain|>json",
        ),
    ]  # fmt: skip
    tokens = render_messages(messages, tokenizer, drop_analysis=False)
    length = len(opening("assistant", tokenizer))
    constraint = TurnConstraint(TurnRules(calls=functions), tokenizer, length)
    for end in range(length, len(tokens)):
        logits = constraint(tokens[:end], np.zeros(tokenizer.vocab_size, np.float32))
        assert logits[tokens[end]] == 0, tokenizer.decode(tokens[: end + 1])


def test_text_without_a_form_is_any_text_up_to_its_end(compiler: tuple[Tokenizer, GrammarCompiler]) -> None:
    tokenizer, _ = compiler
    ordinary = set(range(tokenizer.vocab_size)) - tokenizer.special_ids
    for text, end in (
        ("<|channel|>analysis<|message|>Hm", "<|end|>"),
        ("<|channel|>commentary<|message|>Hm", "<|end|>"),
        ("<|channel|>final<|message|>Hm", "<|return|>"),
        ("<|channel|>commentary to=functions.f<|message|>Hm", "<|call|>"),
    ):
        following = set(allowed(TurnRules(calls={"f": None}), tokenizer, text).tolist())
        assert following == ordinary | {tokenizer.special[end]}


def test_ids_behind_the_vocabulary_are_never_allowed(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    rules = TurnRules(content=demo_compiler.json_object())
    for text in ("", "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"):
        constraint = TurnConstraint(rules, demo, 0)
        logits = constraint(spelled(demo, text), np.zeros(demo.vocab_size + 500, np.float32))
        assert logits.shape == (demo.vocab_size + 500,) and logits.max() == 0
        assert (logits[demo.vocab_size :] == -np.inf).all()


def test_asked_again_for_the_same_tokens_a_turn_gives_the_same_answer(
    demo: Tokenizer, demo_compiler: GrammarCompiler
) -> None:
    constraint = TurnConstraint(TurnRules(content=demo_compiler.json_object()), demo, 2)
    tokens = [1, 2, *spelled(demo, '<|channel|>final<|message|>{"a": [1, "b"]}<|return|>')]
    for end in range(2, len(tokens) + 1):
        first, second = (constraint(tokens[:end], np.zeros(demo.vocab_size, np.float32)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
    assert (first == 0).all()  # behind the end there is nothing to keep to


def test_a_token_that_was_not_allowed_is_an_error(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    rules = TurnRules(content=demo_compiler.json_object())
    refused = r"token \d+ \('<\|message\|>'\) cannot stand in a header of this turn"
    with pytest.raises(RequestError, match=refused):
        allowed(rules, demo, "<|channel|><|message|>")
    with pytest.raises(RequestError, match="the grammar of the text stopped"):
        allowed(rules, demo, "<|channel|>final<|message|>[")
    with pytest.raises(RequestError, match="cannot stand in a header"):
        allowed(TurnRules(), demo, "<|channel|>commentary to=<|call|>")


# Reasoning


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 20])
@pytest.mark.parametrize("calls", [None, {"f": None}])
def test_reasoning_keeps_to_its_budget(
    demo: Tokenizer, budget: int, calls: Mapping[str, Grammar | None] | None
) -> None:
    close = float(np.log(demo.vocab_size))
    wish = dict.fromkeys(("<|return|>", "<|call|>", "<|message|>", "<|channel|>"), close)
    wish["<|end|>"] = close - 3
    writer = Writer(demo, wish)
    most = 0
    for _ in range(30):
        tokens = writer.write(TurnRules(calls=calls, reasoning_tokens=budget))
        reader = TurnReader(demo, ())
        pieces = [reader.feed(token) for token in tokens]
        reasoned = sum(piece.channel == "analysis" and piece.recipient is None for piece in pieces)
        assert reasoned <= budget and read_any(demo, tokens)
        most = max(most, reasoned)
    assert most == (budget if budget > 2 else 0)


def test_a_short_thought_leaves_the_rest_of_the_budget_to_the_next(demo: Tokenizer) -> None:
    rules = TurnRules(calls={}, reasoning_tokens=10)
    thought = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>"
    first = set(demo.encode("analysis")[:1])
    assert first < set(allowed(rules, demo, thought.format("!!!!!")).tolist())
    assert not first & set(allowed(rules, demo, thought.format("!!!!!!")).tolist())


def test_a_turn_whose_end_has_a_form_thinks_once(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
    analysis, final, commentary = (demo.encode(name)[0] for name in ("analysis", "final", "commentary"))
    free, form = {"f": None}, demo_compiler.compile({"type": "object"})
    for rules, ends in (
        (TurnRules(calls=free), {analysis, final, commentary}),
        (TurnRules(calls=free, answer=False), {commentary}),
        (TurnRules(calls=free, answer=False, reasoning_tokens=99), {commentary}),
        (TurnRules(form, calls=free), {final, commentary}),
        (TurnRules(form, calls={}), {final}),
    ):
        assert analysis in allowed(rules, demo, "<|channel|>").tolist()
        assert set(allowed(rules, demo, thought).tolist()) == ends


@pytest.mark.parametrize("budget", [-1, True, 1.0])
def test_a_budget_is_a_number_of_tokens(budget: Any) -> None:
    with pytest.raises(RequestError, match="reasoning_tokens is"):
        TurnRules(reasoning_tokens=budget)


@pytest.mark.parametrize("calls", [None, {}])
def test_rules_leave_something_to_say(calls: Any) -> None:
    with pytest.raises(RequestError, match="no function is named"):
        TurnRules(calls=calls, answer=False)


# Through the engine


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_would_never_call_calls(
    demo: Tokenizer, demo_compiler: GrammarCompiler, seed: int
) -> None:
    model, _ = gl.load("demo", device="cpu")
    chat = [{"role": "user", "content": "How is the weather?"}]
    prompt = render_prompt(from_chat(chat, date="2026-01-01"), demo)
    rules = TurnRules(calls={"weather": demo_compiler.compile(strict(ok={"type": "boolean"}))}, answer=False)
    sampling = gl.SamplingParams(seed=seed, logits_processors=[TurnConstraint(rules, demo, len(prompt))])
    options: dict[str, Any] = {"sampling": sampling, "date": "2026-01-01", "max_tokens": 3000}
    *_, last = gl.stream_generate(model, demo, messages=chat, **options)
    assert last.finish_reason == "tool_calls"
    *thoughts, call = last.messages
    assert call.recipient == "functions.weather" and len(thoughts) <= 1


def test_the_model_keeps_to_schema_and_budget(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    model, _ = gl.load("demo", device="cpu")
    schema = strict(mood={"enum": ["calm", "wild"]}, ships={"type": "integer", "minimum": 1, "maximum": 9},
                    title={"type": "string", "maxLength": 20})  # fmt: skip
    chat = [{"role": "user", "content": "Write a paragraph about the sea and a ship."}]
    prompt = render_prompt(from_chat(chat, reasoning_effort="high", date="2026-01-01"), demo)
    rules = TurnRules(demo_compiler.compile(schema), {}, reasoning_tokens=12)
    sampling = gl.SamplingParams(seed=1, logits_processors=[TurnConstraint(rules, demo, len(prompt))])
    *_, last = gl.stream_generate(
        model,
        demo,
        messages=chat,
        sampling=sampling,
        reasoning_effort="high",
        date="2026-01-01",
        max_tokens=200,
    )
    assert last.finish_reason == "stop" and last.usage is not None
    assert last.usage.reasoning_tokens == 12
    assert fits(json.loads(last.messages[-1].text), schema)
