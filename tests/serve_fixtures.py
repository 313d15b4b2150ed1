"""Served models for the tests of the API: the demo, and one that says what a test has it say."""

import http.client
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, TypeAdapter

import gptoss_lite
from gptoss_lite.engine import Engine
from gptoss_lite.harmony.parse import turn_ends
from gptoss_lite.model import GptOss
from gptoss_lite.serve.app import create_app
from gptoss_lite.serve.settings import Settings
from gptoss_lite.tokenizer import EMBEDDED_VOCAB_SIZE, Tokenizer
from tests.scripted import ScriptedModel
from tests.serving import served

DEMO = Path(gptoss_lite.__file__).parent / "demo"
FIXTURES = Path(os.environ.get("GPTOSS_LITE_FIXTURES", Path(__file__).parent / "data"))
MODEL = "gpt-oss-test"
UNKNOWN_IDS = 8  # that the scripted model can say, and the tokenizer does not know
SPECIAL = re.compile(r"<\|[a-z_0-9]+\|>")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, parsed, and the last one, which is no JSON, as it is."""
        data = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [part if part == "[DONE]" else json.loads(part) for part in data]


@dataclass(frozen=True, slots=True)
class Api:
    """A server on a socket, the engine behind it, and a client of it."""

    url: str
    engine: Engine
    tokenizer: Tokenizer
    client: OpenAI

    def async_client(self) -> AsyncOpenAI:
        """Return a client for one event loop, to be closed there."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.client.api_key, max_retries=0, timeout=60)

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Reply:
        """Send a request as it stands: a body of bytes as they are, any other as JSON."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.client.api_key}", "Content-Type": content_type}
        try:
            connection.request(method, path, None if body is None else data, headers)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, **fields: Any) -> Reply:
        """Ask an endpoint for something of the model."""
        return self.request("POST", f"/v1/{path}", {"model": MODEL, **fields})

    def metrics(self) -> dict[str, float]:
        """Return the server's counters and gauges, by their names and labels."""
        lines = self.request("GET", "/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("gptoss_lite_"): float(value) for name, value in pairs}


@dataclass(slots=True)
class Script:
    """What a scripted model says to each prompt that it has not seen; the last answer goes for the rest."""

    tokenizer: Tokenizer
    prompts: list[list[int]] = field(default_factory=list)
    _answers: list[list[int]] = field(default_factory=list)
    _given: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def say(self, *answers: str | Sequence[int]) -> None:
        """Set the answers, as token ids or as text with special tokens in it; forget the prompts seen.

        The engine may be a step ahead of an answer that has ended, so nothing is forgotten before all is set.
        """
        self._answers = [
            self.sampled(answer) if isinstance(answer, str) else list(answer) for answer in answers
        ]
        self.prompts, self._given = [], {}

    def sampled(self, text: str) -> list[int]:
        """Encode a text as a model would have sampled it, special tokens as themselves."""
        tokens = self.tokenizer.encode(SPECIAL.split(text)[0])
        for name, plain in zip(SPECIAL.findall(text), SPECIAL.split(text)[1:], strict=True):
            tokens += [self.tokenizer.special[name], *self.tokenizer.encode(plain)]
        return tokens

    def heard(self, index: int = -1) -> str:
        """Return a prompt as text."""
        return self.tokenizer.decode(self.prompts[index])

    def __call__(self, prompt: Sequence[int]) -> Sequence[int]:
        """See tests.scripted.Script."""
        key = tuple(prompt)
        if key not in self._given:
            self._given[key] = self._answers[min(len(self.prompts), len(self._answers) - 1)]
            self.prompts.append(list(prompt))
        return self._given[key]


@dataclass(frozen=True, slots=True)
class Stage:
    """A served model that says what its script says."""

    api: Api
    script: Script
    model: ScriptedModel


@contextmanager
def serving(engine: Engine, tokenizer: Tokenizer, settings: Settings) -> Iterator[Api]:
    """Serve an engine while the block runs."""
    key = settings.api_keys[0] if settings.api_keys else "none"
    with (
        served(create_app(engine, tokenizer, settings)) as url,
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client,
    ):
        yield Api(url, engine, tokenizer, client)


@contextmanager
def staged(*, context: int = 4096, **settings: Any) -> Iterator[Stage]:
    """Serve a scripted model with the vocabulary of gpt-oss while the block runs."""
    tokenizer = embedded_tokenizer()
    script = Script(tokenizer)
    model = ScriptedModel(DEMO, tokenizer, script, context)
    model.config = replace(model.config, vocab_size=tokenizer.vocab_size + UNKNOWN_IDS)
    with serving(Engine(model), tokenizer, Settings(MODEL, date="2026-01-01", **settings)) as api:
        yield Stage(api, script, model)


@contextmanager
def demo_served(**settings: Any) -> Iterator[Api]:
    """Serve the bundled model while the block runs."""
    model, tokenizer = demo_model()
    with serving(Engine(model), tokenizer, Settings(MODEL, date="2026-01-01", **settings)) as api:
        yield api


@cache
def embedded_tokenizer() -> Tokenizer:
    """Return the vocabulary of gpt-oss, made once."""
    return Tokenizer.embedded()


@cache
def demo_model() -> tuple[GptOss, Tokenizer]:
    """Return the bundled model on one thread, loaded once."""
    return gptoss_lite.load("demo", device="cpu", threads=1)


def unknown_fields(kind: Any, value: Any) -> set[str]:
    """Hold a reply against a type of the client's: raises where it does not fit, returns what it adds."""
    return set(_extras(_adapter(kind).validate_python(value)))


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # of some of the client's types this takes seconds


def _extras(value: Any) -> Iterator[str]:
    match value:
        case BaseModel():
            yield from value.model_extra or ()
            for name in type(value).model_fields:
                yield from _extras(getattr(value, name))
        case list():
            for item in value:
                yield from _extras(item)


def golden_turns() -> pytest.MarkDecorator:
    """Run a test on each golden stream of one assistant turn, most of them malformed, as `turn`."""
    files = [json.loads(path.read_text("utf-8")) for path in sorted(FIXTURES.glob("harmony/*.json"))]
    most = EMBEDDED_VOCAB_SIZE + UNKNOWN_IDS
    turns = [
        turn
        for file in files
        for turn in file["streams"]
        if turn["kind"] == "turn" and all(token < most for token in turn["tokens"])
    ]
    return pytest.mark.parametrize("turn", turns, ids=[turn["id"] for turn in turns])


def is_ended(turn: Mapping[str, Any]) -> bool:
    """Tell whether a golden turn ends by itself."""
    return not turn_ends(embedded_tokenizer()).isdisjoint(turn["tokens"])
