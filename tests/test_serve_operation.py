"""Running the server: who may ask, what is counted and written down, who waits and who comes again."""

import asyncio
import hmac
import json
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import PlainTextResponse
from starlette.types import Message

from gptoss_lite.serve.middleware import AccessLog
from tests.raw_http import Reply, head
from tests.talker import CHAT, MODEL, Talker, chat, talking, wait_until

KEYS = ("sk-first", "sk-second", "sk-third")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Talker]:
    """A server that asks for a key, and lets one page of another origin call."""
    with talking(api_keys=KEYS, cors_origins=("https://page.example",)) as talker:
        yield talker


@pytest.fixture(scope="module")
def local() -> Iterator[Talker]:
    """A server as it is by default on a loopback address."""
    with talking(allowed_hosts=("127.0.0.1", "::1", "localhost", "Box.example")) as talker:
        yield talker


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_any_of_the_keys_opens(guarded: Talker, scheme: str, key: str) -> None:
    assert guarded.ask(headers={"authorization": f"{scheme} {key}"}).status == 200


@pytest.mark.parametrize(
    "authorization",
    ["Bearer sk-wrong", "Bearer", "Bearer ", "Basic sk-first", "sk-first", "Bearer sk-firs", "",
     "Bearer sk-first sk-first", "Bearer sk-first,sk-second", "Bearer SK-FIRST", "Bearer \xff\xfe"],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_nothing_else_does(guarded: Talker, path: str, authorization: str) -> None:
    reply = guarded.post(path, chat(), authorization=authorization)
    assert reply.status == 401
    assert reply.json["error"]["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "bearer"
    assert "sk-" not in reply.error


def test_without_a_header_the_refusal_says_what_to_send(guarded: Talker) -> None:
    assert guarded.ask().error == "no API key was given: send `Authorization: Bearer KEY`"
    assert guarded.get("/v1/models").status == 401


@pytest.mark.parametrize("path", ["/%761/models", "/v1/models?key=sk-first", "/v1/models/", "/v1/nowhere"])
def test_no_spelling_of_a_path_gets_around_the_keys(guarded: Talker, path: str) -> None:
    assert guarded.get(path).status == 401


@pytest.mark.parametrize("path", ["/health", "/metrics", "/", "/openapi.json"])
def test_what_tells_nothing_of_anybody_is_open(guarded: Talker, path: str) -> None:
    assert guarded.get(path).status == 200


def test_every_key_is_compared_in_constant_time(guarded: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, same = [], hmac.compare_digest

    def compare(given: bytes, kept: bytes) -> bool:
        compared.append((len(given), len(kept)))
        return same(given, kept)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    guarded.get("/v1/models", authorization="Bearer sk-first")
    guarded.get("/v1/models", authorization="Bearer " + "x" * 1000)
    assert compared == [(32, 32)] * 2 * len(KEYS)


def test_a_key_finds_nothing_that_another_left_in_the_cache(guarded: Talker) -> None:
    def cached(key: str) -> int:
        asked = {"model": MODEL, "prompt": [7] * 200}
        reply = guarded.post("/v1/completions", asked, authorization=f"Bearer {key}")
        found: int = reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached("sk-first"), cached("sk-second"), cached("sk-first")] == [0, 0, 192]


def test_pages_of_other_origins_are_told_nothing_unless_asked(local: Talker) -> None:
    origin = {"origin": "https://page.example"}
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}
    with local.connect() as raw:
        raw.send(head("OPTIONS", CHAT, **origin, **asked))
        preflight = raw.reply()
    simple = local.ask(headers=origin)
    assert (preflight.status, simple.status) == (405, 200)
    assert not [name for reply in (preflight, simple) for name in reply.headers if "access-control" in name]


@pytest.mark.parametrize(
    ("origin", "allowed"), [("https://page.example", True), ("https://evil.example", False)]
)
def test_the_page_that_may_call_can_do_so_with_any_client(
    guarded: Talker, origin: str, allowed: bool
) -> None:
    asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
    with guarded.connect() as raw:
        raw.send(
            head(
                "OPTIONS", CHAT, origin=origin, access_control_request_method="POST",
                access_control_request_headers=asked,
            )
        )  # fmt: skip
        preflight = raw.reply()
    refusal = guarded.ask(headers={"origin": origin})
    assert preflight.status == (200 if allowed else 400)
    assert refusal.status == 401
    for reply in preflight, refusal:
        assert reply.headers.get("access-control-allow-origin") == (origin if allowed else None)
        assert "access-control-allow-credentials" not in reply.headers
    if allowed:
        assert preflight.headers["access-control-allow-headers"] == asked
    assert "retry-after" in refusal.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1:8000", "[::1]:8000", "[::1]", "LOCALHOST:1", "box.example", "Box.Example:80"],
)
def test_a_server_answers_to_its_own_names(local: Talker, host: str) -> None:
    assert local.get("/health", host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:localhost",
        "127.0.0.2",
        "",
        "[",
        "localhost@evil",
    ],
)
@pytest.mark.parametrize("path", ["/health", "/", "/metrics", "/v1/models"])
def test_and_to_no_other(local: Talker, path: str, host: str) -> None:
    reply = local.get(path, host=host)
    assert reply.status == 421
    assert "--allowed-host" in reply.error


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_a_body_that_a_page_may_send_unasked_is_not_read(local: Talker, kind: str) -> None:
    reply = local.ask(headers={"content_type": kind})
    assert (reply.status, reply.error) == (415, f"content-type is {kind!r}: send application/json")


def test_the_type_of_a_body_may_have_parameters(local: Talker) -> None:
    assert local.ask(headers={"content_type": "Application/JSON; charset=utf-8"}).status == 200


HOSTILE = {
    "nothing": b"",
    "no JSON": b"{",
    "two objects": b"{}{}",
    "no object": b"[]",
    "no UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "talker"}'.encode("utf-16"),
    "half a surrogate pair": b'{"model": "talker", "messages": [{"role": "user", "content": "\\ud800."}]}',
    "not a number": b'{"model": "talker", "temperature": NaN}',
    "a number beyond all": b'{"model": "talker", "seed": %b}' % (b"9" * 5000),
    "arrays in arrays": b'{"model": "talker", "messages": %b}' % (b"[" * 100_000 + b"]" * 100_000),
    "objects in objects": b'{"model": ' * 100_000 + b"1" + b"}" * 100_000,
    "ten thousand keys": json.dumps(chat() | {f"key{i}": i for i in range(10_000)}).encode(),
    "ten thousand tokens": json.dumps(chat(logit_bias={str(i): 1 for i in range(10_000)})).encode(),
    "ten thousand messages": json.dumps(chat(messages=[{"role": "user", "content": ""}] * 10_000)).encode(),
    "a long name": json.dumps(chat() | {"k" * 1_000_000: 1}).encode(),
    "a long model": json.dumps(chat(model="m" * 1_000_000)).encode(),
    "a long role": json.dumps(chat(messages=[{"role": "r" * 1_000_000}])).encode(),
    "a long text": json.dumps(chat(messages=[{"role": "user", "content": "a" * 1_000_000}])).encode(),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_hostile_body_gets_a_short_error_and_the_connection_goes_on(
    local: Talker, path: str, body: bytes
) -> None:
    with local.connect() as raw:
        raw.post(path, body)
        reply = raw.reply()
        assert reply.status in (400, 404)
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}
        assert len(reply.body) < 1000
        assert raw.get("/health").status == 200


def test_an_error_without_a_field_names_none(local: Talker) -> None:
    schema: dict[str, object] = {}
    for _ in range(400):
        schema = {"a": schema}
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    error = local.ask(response_format=form).json["error"]
    assert error["message"] == "the schema of a tool or response format is nested too deeply"
    assert error["param"] is None


def test_ten_thousand_keys_where_they_may_be_are_taken(local: Talker) -> None:
    metadata = {str(i): "x" for i in range(10_000)}
    assert local.ask(metadata=metadata).status == 200


@pytest.mark.parametrize(
    "path", ["/", "/health", "/metrics", "/v1/models", CHAT, "/nowhere", "*", "//x/", "/%00"]
)
@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "OPTIONS", "TRACE"])
def test_methods_and_paths_that_there_are_not_get_an_error(local: Talker, method: str, path: str) -> None:
    with local.connect() as raw:
        raw.send(head(method, path, 0))
        reply = raw.reply()
        assert reply.status in (404, 405)
        assert reply.json["error"]["type"] in ("not_found_error", "invalid_request_error")


def test_a_full_queue_says_when_to_come_again_and_then_takes_more() -> None:
    with talking(length=3000, seconds=0.005, max_sequences=2, max_waiting=3) as talker:
        assert talker.ask(n=6).error == "6 answers are more than this server takes at once, 5: ask for fewer"
        with talker.connect() as first:
            first.post(CHAT, chat(n=2, stream=True))
            wait_until(lambda: talker.engine.running == 2)
            with talker.connect() as second:
                second.post(CHAT, chat(n=2, stream=True))
                wait_until(lambda: talker.engine.waiting == 2)
                reply = talker.ask(n=2)
                assert (reply.status, reply.json["error"]["code"]) == (429, "queue_full")
                assert reply.json["error"]["type"] == "rate_limit_error"
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                with talker.connect() as third:  # one more has room
                    third.post(CHAT, chat(stream=True))
                    wait_until(lambda: talker.engine.waiting == 3)
                    assert talker.ask().status == 429
                    metrics = talker.metrics()
                    assert (metrics["running_requests"], metrics["waiting_requests"]) == (2, 3)
        wait_until(talker.is_at_rest)
        assert talker.ask(n=5, max_tokens=3).status == 200


def test_a_prompt_asked_for_often_is_computed_once() -> None:
    with talking(max_sequences=4) as talker:
        words = [{"role": "user", "content": "Talk of many things. " * 20}]
        usage = talker.ask(n=4, messages=words).json["usage"]
        counted = talker.engine.statistics
        rest = (usage["prompt_tokens"] - 1) % 64 + 1  # what is in no whole block
        assert counted.prefilled_tokens == usage["prompt_tokens"] + 3 * rest
        assert counted.cached_tokens + counted.prefilled_tokens == counted.prompt_tokens


def test_metrics_move_as_requests_do() -> None:
    with talking(length=20, max_sequences=2) as talker:
        before = talker.metrics()
        assert talker.ask(n=2).status == 200
        assert talker.ask(max_tokens=5, stream=True).status == 200
        assert talker.ask(model="other").status == 404
        assert talker.get("/v1/secret-path").status == 404
        text = talker.get("/metrics")
        after = talker.metrics()
        families = {family.name: family for family in text_string_to_metric_families(text.body.decode())}
        assert families["gptoss_lite_finished"].type == "counter"

        moved = {name: value - before.get(name, 0) for name, value in after.items()}
        asked = 'requests_total{path="/v1/chat/completions",status="%d"}'
        assert (moved[asked % 200], moved[asked % 404]) == (2, 1)
        assert moved['requests_total{path="other",status="404"}'] == 1
        assert (moved['finished_total{reason="stop"}'], moved['finished_total{reason="length"}']) == (2, 1)
        assert moved["completion_tokens_total"] == moved["generated_tokens_total"] == 2 * 20 + 5
        assert moved["time_to_first_token_seconds_count"] == 3
        assert moved["time_per_output_token_seconds_count"] == 3
        assert moved["answer_seconds_count"] == 2
        assert moved["cached_tokens_total"] == 2 * 64  # the second of two, and the one after them
        assert moved["cached_tokens_total"] + moved["prefilled_tokens_total"] == moved["prompt_tokens_total"]
        assert (after["running_requests"], after["waiting_requests"]) == (0, 0)
        assert after["free_cache_tokens"] == talker.engine.free_tokens


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, object]]:
    """Wait for so many lines of the access log; what else was logged fails the test."""
    wait_until(lambda: len(caplog.records) >= count)
    assert {record.name for record in caplog.records} == {"gptoss_lite.access"}
    return [json.loads(record.message) for record in caplog.records]


def test_the_access_log_has_a_line_per_request_and_no_word_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptoss_lite.access")
    secret = {"messages": [{"role": "user", "content": "the secret word"}], "user": "the secret user"}
    with talking(api_keys=("sk-secret",), length=2000, seconds=0.002) as talker:
        entry = {"authorization": "Bearer sk-secret"}
        talker.ask(headers=entry, max_tokens=9, **secret)
        talker.ask(headers=entry, max_tokens=9, stream=True, **secret)
        talker.ask(headers={"authorization": "Bearer sk-secret-but-wrong"}, **secret)
        talker.ask(headers=entry, model="secret", **secret)
        talker.ask(headers=entry, secret="secret", **secret)
        talker.get("/health?key=sk-secret")
        for stream in False, True:
            with talker.connect() as raw:
                raw.post(CHAT, chat(stream=stream, **secret), **entry)
                wait_until(lambda: talker.engine.running == 1)
                time.sleep(0.05)
            wait_until(talker.is_at_rest)
        told = lines(caplog, 8)
    assert [(line["path"], line["status"]) for line in told] == [
        (CHAT, 200), (CHAT, 200), (CHAT, 401), (CHAT, 404), (CHAT, 400), ("/health", 200), (CHAT, 499),
        (CHAT, 200),
    ]  # fmt: skip
    assert [line.get("finish_reasons") for line in told[:2] + told[6:]] == [["length"]] * 2 + [
        ["abandoned"]
    ] * 2
    basic = {"time", "request_id", "client", "method", "path", "status", "ms"}
    counts = {"prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"}
    assert set(told[0]) == set(told[1]) == basic | counts | {"finish_reasons", "first_token_ms"}
    assert set(told[2]) == set(told[5]) == basic
    assert (told[0]["completion_tokens"], told[0]["client"], told[0]["method"]) == (9, "127.0.0.1", "POST")
    assert len({line["request_id"] for line in told}) == len(told)
    assert "secret" not in caplog.text
    assert "so on" not in caplog.text


def test_an_answer_names_its_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptoss_lite.access")
    with talking() as talker:
        replies = [talker.ask(), talker.ask(stream=True), talker.ask(n=0), talker.get("/nowhere")]
        assert [reply.headers["x-request-id"] for reply in replies] == [
            line["request_id"] for line in lines(caplog, 4)
        ]


def test_a_gateway_may_name_the_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptoss_lite.access")
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "state": {"request_id": "of the gateway"}}
    with talking() as talker:
        app = AccessLog(PlainTextResponse("hello"), talker.service.metrics, frozenset())
        asyncio.run(app(scope, receive, send))
        [line] = lines(caplog, 1)
    assert line["request_id"] == "of the gateway"
    assert (b"x-request-id", b"of the gateway") in sent[0]["headers"]


def test_a_server_that_drains_says_so_and_takes_no_more() -> None:
    with talking(length=300, seconds=0.005) as talker, talker.connect() as raw, talker.connect() as kept:
        raw.post(CHAT, chat(stream=True))
        wait_until(lambda: talker.engine.running == 1)
        assert kept.get("/health").json == {"status": "ok"}
        talker.service.drain()
        health = kept.get("/health")
        assert (health.status, health.json) == (503, {"status": "draining"})
        kept.post(CHAT, chat())
        refusal = kept.reply()
        assert (refusal.status, refusal.headers["retry-after"]) == (503, "5")
        assert raw.reply().events[-1] == "[DONE]"


def test_an_answer_may_be_limited_in_time() -> None:
    with talking(length=4000, seconds=0.005, max_seconds=0.3) as talker:
        for stream in False, True:
            begun = time.monotonic()
            reply = talker.ask(stream=stream)
            assert 0.3 <= time.monotonic() - begun < 1.5
            assert "length" in (reply.events[-2] if stream else reply.json)["choices"][0]["finish_reason"]


def test_an_engine_that_stops_fails_its_answers_and_is_not_healthy(caplog: pytest.LogCaptureFixture) -> None:
    with talking(length=1000, seconds=0.005) as talker:
        replies: list[Reply] = []
        threads = [
            threading.Thread(target=lambda s=stream: replies.append(talker.ask(stream=s)))
            for stream in (False, True)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: talker.engine.running == 2)
        talker.model.seconds = -1.0  # time.sleep refuses
        for thread in threads:
            thread.join()
        assert sorted(reply.status for reply in replies) == [200, 500]
        stream = next(reply for reply in replies if reply.status == 200)
        assert stream.events[-2]["error"]["type"] == "server_error"
        assert stream.events[-1] == "[DONE]"
        assert talker.get("/health").json == {"status": "failed"}
        assert talker.ask().status == 503
        told = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(told) == 2  # whoever runs it can see why
        assert "sleep length must be non-negative" in caplog.text
