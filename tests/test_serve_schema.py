"""The served OpenAPI document: sound, true of what is accepted, a source of requests that break nothing."""

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from tests.talker import CHAT, Talker, chat, talking

ANSWERING = (CHAT, "/v1/completions", "/v1/responses")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def talker() -> Iterator[Talker]:
    """A server whose answers are short, whatever is asked for."""
    with talking(length=12, context=1024) as talker:
        yield talker


@pytest.fixture(scope="module")
def document(talker: Talker) -> Any:
    return talker.get("/openapi.json").json


def test_the_document_is_valid(document: Any) -> None:
    assert [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_every_reference_leads_somewhere(document: Any) -> None:
    parts, names = [document], set()
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            names |= {part["$ref"]} if "$ref" in part else set()
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    assert names == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def test_every_path_is_described(document: Any, talker: Talker) -> None:
    paths = {line.split('path="')[1].split('"')[0] for line in _visited(talker)}
    assert set(document["paths"]) == paths - {"other", "/", "/openapi.json"} | {"/v1/models/{model}"}


def _visited(talker: Talker) -> list[str]:
    for path in "/", "/health", "/openapi.json", "/v1/models", "/metrics", *ANSWERING:
        talker.get(path)
    return [name for name in talker.metrics() if name.startswith("requests_total")]


def test_keys_are_described_where_they_are_asked_for(document: Any) -> None:
    with talking(api_keys=("sk-1",)) as guarded:
        assert guarded.get("/openapi.json").json["security"] == [{"key": []}]
    assert document["security"] == []


@pytest.mark.parametrize(
    ("asked", "accepted"),
    [
        (chat(), True), (chat(n=2, stop="x", seed=-1, top_k=None), True), (chat(stop=["x"] * 17), False),
        (chat(model="other"), False), (chat(temperature=3), False), (chat(tools=[{"type": "web"}]), False),
        (chat(messages=[]), False), (chat(messages=[{"role": "user"}]), False), (chat(unknown=1), False),
        (chat(response_format={"type": "json_object"}), True), (chat(response_format={"type": "xml"}), False),
    ],
)  # fmt: skip
def test_a_chat_is_described_as_it_is_accepted(
    document: Any, talker: Talker, asked: dict[str, Any], accepted: bool
) -> None:
    body = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    assert jsonschema_rs.is_valid(body, asked) == accepted
    assert (talker.post(CHAT, asked).status == 200) == accepted


@pytest.mark.parametrize("path", ANSWERING)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_made_up_from_the_document_get_an_answer_or_an_error(
    document: Any, talker: Talker, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"http://127.0.0.1:{talker.port}")
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=15, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        response = case.call(session=session)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks)

    with warnings.catch_warnings(action="ignore"), requests.Session() as session:
        ask()
    assert set(statuses) == ({200, 400} if mode == GenerationMode.POSITIVE else {400})


@pytest.mark.soak
def test_many_requests_made_up_from_the_document_find_no_failure(talker: Talker, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{talker.port}/openapi.json"
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", url, "--checks", ",".join(CHECKS),
            "--max-examples", "100", "--phases", "coverage,fuzzing", "--no-color",
        ],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert talker.ask().status == 200
