"""Clients that dawdle, flood, vanish or stop reading: they lose their connection, and nobody else notices."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.raw_http import PATIENCE, Raw, head
from tests.talker import CHAT, MODEL, Talker, chat, talking, wait_until

SOON = 0.2  # seconds: the servers' limits here
OPENING = head("POST", CHAT, 1000)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Talker]:
    """A server that waits for nobody."""
    with talking(max_body=100_000, head_seconds=SOON, body_seconds=SOON) as talker:
        yield talker


@pytest.fixture(scope="module")
def calm() -> Iterator[Talker]:
    """A server that waits as long as servers do."""
    with talking(max_body=100_000) as talker:
        yield talker


@pytest.fixture(scope="module")
def slow() -> Iterator[Talker]:
    """A server that has not finished when its clients go."""
    with talking(length=2000, seconds=0.02) as talker:
        yield talker


@pytest.mark.parametrize("served", [0, 1], ids=["new", "kept"])
@pytest.mark.parametrize("sent", [b"P", b"POST /v1/chat", OPENING[:-2]], ids=["a letter", "a line", "a head"])
def test_a_request_that_does_not_come_is_not_waited_for(hasty: Talker, served: int, sent: bytes) -> None:
    with hasty.connect() as raw:
        for _ in range(served):
            raw.get("/health")
        begun = time.monotonic()
        raw.send(sent)
        assert raw.is_closed()
        assert SOON - 0.02 < time.monotonic() - begun < SOON + 1


def test_a_connection_on_which_nothing_comes_is_dropped(hasty: Talker) -> None:
    with hasty.connect() as raw:
        assert raw.is_closed()


def test_the_rest_of_a_body_that_nobody_reads_is_not_waited_for_for_ever(hasty: Talker) -> None:
    with hasty.connect() as raw:
        raw.send(head("POST", "/nowhere", 1000) + b" " * 500)
        assert raw.reply().status == 404
        raw.send(b" ")
        assert raw.is_closed()


def test_a_head_that_comes_byte_by_byte_gains_no_time(hasty: Talker) -> None:
    with hasty.connect() as raw, pytest.raises(ConnectionError):
        for byte in head("GET", "/health", x="-" * 1000):
            raw.send(bytes([byte]))
            time.sleep(0.01)


def test_a_kept_connection_may_rest(hasty: Talker) -> None:
    with hasty.connect() as raw:
        assert raw.get("/health").status == 200
        time.sleep(2 * SOON)
        assert raw.get("/health").status == 200


def test_a_body_that_does_not_come_is_told_so(hasty: Talker) -> None:
    with hasty.connect() as raw:
        raw.send(OPENING + b'{"model":')
        reply = raw.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert reply.error == "the body took more than 0.2 s to arrive"
        assert raw.is_closed()


@pytest.mark.parametrize("flood", [b"x: " + b"a" * 1000, b"x: a\r\n" * 100, b"a" * 1000, b"\r\n" * 500])
@pytest.mark.parametrize("start", [b"GET /health HTTP/1.1\r\n", b"GET /"])
def test_a_head_without_end_is_cut_off(calm: Talker, start: bytes, flood: bytes) -> None:
    with calm.connect() as raw:
        raw.send(start)
        sent = 0
        try:
            while sent < 10_000_000:
                raw.send(flood)
                sent += len(flood)
        except ConnectionError:
            pass
        assert sent < 10_000_000


def test_a_head_that_is_too_long_is_told_so(calm: Talker) -> None:
    with calm.connect() as raw:
        raw.send(b"GET /health HTTP/1.1\r\nx: " + b"a" * 65_536)
        reply = raw.reply()
        assert (reply.status, reply.error) == (431, "a request's head has more than 65536 bytes")


def test_trailers_without_end_are_cut_off(calm: Talker) -> None:
    with calm.connect() as raw, pytest.raises(ConnectionError):
        raw.send(head("POST", CHAT, transfer_encoding="chunked") + b"1\r\n \r\n0\r\n")
        for _ in range(1000):
            raw.send(b"x: " + b"a" * 9994 + b"\r\n")


def test_a_body_in_chunks_of_one_byte_is_read(calm: Talker) -> None:
    body = b'{"model": "%b", "messages": [{"role": "user", "content": "%b"}]}' % (MODEL.encode(), b"a" * 2000)
    with calm.connect() as raw:
        raw.send(head("POST", CHAT, transfer_encoding="chunked"))
        raw.send(b"".join(b"1\r\n%c\r\n" % byte for byte in body * 40) + b"0\r\n\r\n")
        assert raw.reply().status == 400  # forty bodies are no JSON; what matters is that all was read
        raw.send(head("POST", CHAT, transfer_encoding="chunked"))
        raw.send(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert raw.reply().status == 200


def test_a_body_that_is_announced_too_long_is_not_read(calm: Talker) -> None:
    with calm.connect() as raw:
        raw.send(head("POST", CHAT, 100_001))
        reply = raw.reply()
        assert (reply.status, reply.error) == (413, "the body has more than 100000 bytes")
        raw.send(b" " * 100_001)
        assert raw.get("/health").status == 200


def test_a_body_that_is_too_long_is_not_asked_for(calm: Talker) -> None:
    with calm.connect() as raw:
        raw.send(head("POST", CHAT, 100_001, expect="100-continue"))
        assert raw.reply().status == 413
        assert raw.is_closed()
    with calm.connect() as raw:
        raw.send(head("POST", CHAT, 100_000, expect="100-continue"))
        assert raw.reply_head()[0] == 100


def test_a_body_that_turns_out_too_long_is_not_read_to_its_end(hasty: Talker) -> None:
    with hasty.connect() as raw:
        raw.send(head("POST", CHAT, transfer_encoding="chunked"))
        for _ in range(11):
            raw.send(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        assert raw.reply().status == 413
        with pytest.raises(ConnectionError):
            for _ in range(1_000_000):
                raw.send(b"2710\r\n" + b" " * 10_000 + b"\r\n")


def test_a_client_that_sends_too_much_before_it_reads_still_reads_why(calm: Talker) -> None:
    url, headers = f"http://127.0.0.1:{calm.port}{CHAT}", {"content-type": "application/json"}
    assert httpx.post(url, content=b" " * 20_000_000, headers=headers).status_code == 413


def test_what_follows_an_unread_body_is_read_again(calm: Talker) -> None:
    with calm.connect() as raw:
        raw.send(head("POST", "/nowhere", 90_000) + b" " * 90_000)
        assert raw.reply().status == 404
        assert raw.get("/health").status == 200


@pytest.mark.parametrize(
    "request_line",
    [
        "\x16\x03\x01",
        "hello",
        "GET /\xff HTTP/1.1",
        "CONNECT a:1 HTTP/1.1",
        "PRI * HTTP/2.0",
        "GET / HTTP/9.9",
    ],
)
def test_what_is_no_http_gets_an_error_and_no_connection(calm: Talker, request_line: str) -> None:
    with calm.connect() as raw:
        raw.send(request_line.encode("latin-1") + b"\r\nhost: localhost\r\n\r\n")
        assert raw.reply().json["error"]["type"] == "invalid_request_error"
        assert raw.is_closed()


@pytest.mark.parametrize(
    "headers",
    [
        {"content_length": "-1"},
        {"content_length": "1" * 30},
        {"content_length": "5", "transfer_encoding": "chunked"},
        {"transfer_encoding": "chunked, gzip"},
    ],
)
def test_a_length_that_could_be_read_in_two_ways_is_refused(calm: Talker, headers: dict[str, str]) -> None:
    with calm.connect() as raw:
        raw.send(head("POST", CHAT, **headers) + b"0\r\n\r\n")
        assert raw.reply().status == 400
        assert raw.is_closed()


@pytest.mark.parametrize("offer", ["h2c", "websocket"])
def test_the_offer_of_another_protocol_is_declined(calm: Talker, offer: str) -> None:
    with calm.connect() as raw:
        for fields in ({}, {"stream": True}):
            raw.post(CHAT, chat(**fields), connection="Upgrade, HTTP2-Settings", upgrade=offer)
            assert raw.reply().status == 200
        assert raw.get("/health", connection="Upgrade", upgrade=offer).json == {"status": "ok"}


def test_a_request_sent_before_the_last_is_answered_is_left_unread(calm: Talker) -> None:
    with calm.connect() as raw:
        raw.send(head("GET", "/health") + head("POST", CHAT, 2) + b"{}" + head("GET", "/v1/models"))
        assert raw.reply().status == 200
        assert raw.is_closed()


def test_a_client_that_sends_more_and_goes_is_noticed(slow: Talker) -> None:
    with slow.connect() as raw:
        raw.post(CHAT, chat())
        wait_until(lambda: slow.engine.running == 1)
        raw.send(head("POST", CHAT, 1_000_000) + b" " * 1_000_000)
    wait_until(slow.is_at_rest)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked", "answers"),
    [
        (CHAT, chat(), 1),
        ("/v1/responses", {"input": "Talk."}, 1),
        ("/v1/completions", {"prompt": ["Talk."] * 3}, 3),
    ],
)
def test_who_goes_frees_all_blocks_within_a_step(
    slow: Talker,
    caplog: pytest.LogCaptureFixture,
    path: str,
    asked: dict[str, Any],
    answers: int,
    stream: bool,
) -> None:
    usage = {"stream_options": {"include_usage": True}} if stream and path != "/v1/responses" else {}
    with slow.connect() as raw:
        raw.post(path, {"model": MODEL, **asked, "stream": stream, **usage})
        wait_until(lambda: slow.engine.running == answers)
        steps = slow.engine.statistics.steps
        wait_until(lambda: slow.engine.statistics.steps > steps + 3)
        steps = slow.engine.statistics.steps
    wait_until(slow.is_at_rest)
    assert slow.engine.statistics.steps <= steps + 2  # the one under way, and one begun as the news came
    assert not caplog.records


def test_who_goes_while_waiting_is_forgotten(slow: Talker) -> None:
    with slow.connect() as raw:
        raw.post(CHAT, chat(n=16))
        wait_until(lambda: slow.engine.running == 16)
        with slow.connect() as other:
            other.post(CHAT, chat(n=2))
            wait_until(lambda: slow.engine.waiting == 2)
        wait_until(lambda: slow.engine.waiting == 0)
        assert slow.engine.running == 16
    wait_until(slow.is_at_rest)


def test_a_half_closed_connection_counts_as_closed(slow: Talker) -> None:
    with slow.connect() as raw:
        raw.post(CHAT, chat(stream=True))
        wait_until(lambda: slow.engine.running == 1)
        raw.socket.shutdown(socket.SHUT_WR)
        wait_until(slow.is_at_rest)


@pytest.fixture(scope="module")
def tight() -> Iterator[Talker]:
    """A server whose answers do not fit into what the systems at both ends hold, unless they are read."""
    with talking(length=1000, context=2000, write_seconds=SOON, send_buffer=4096) as talker:
        yield talker


def test_who_stops_reading_loses_the_stream_and_holds_up_nobody(tight: Talker) -> None:
    abandoned = 'finished_total{reason="abandoned"}'
    tight.model.seconds = 0.001
    with Raw(tight.port, receive_buffer=4096) as raw:
        raw.post(CHAT, chat(stream=True, logprobs=True, top_logprobs=20))
        assert raw.reply_head()[0] == 200
        deadline = time.monotonic() + PATIENCE
        while tight.metrics().get(abandoned) != 1:
            begun = time.monotonic()
            assert tight.ask(max_tokens=5).status == 200
            assert time.monotonic() < min(begun + 1, deadline)
    wait_until(tight.is_at_rest)


def test_who_does_not_read_a_whole_answer_loses_the_connection(tight: Talker) -> None:
    tight.model.seconds = 0
    for connection in ("keep-alive", "close"):
        with Raw(tight.port, receive_buffer=4096) as raw:
            raw.post(CHAT, chat(max_tokens=300, logprobs=True, top_logprobs=20), connection=connection)
            raw.socket.recv(1)
            time.sleep(2 * SOON)
            with pytest.raises(ConnectionResetError):
                raw.reply()


def test_who_reads_slowly_hears_everything() -> None:
    with (
        talking(length=1000, context=2000, write_seconds=0.5, send_buffer=4096) as talker,
        Raw(talker.port, receive_buffer=4096) as raw,
    ):
        raw.post(CHAT, chat(stream=True, logprobs=True, top_logprobs=20))
        raw.reply_head()
        read, told, begun = 0, b"", time.monotonic()
        for part in raw.chunks():
            read, told = read + len(part), part
            if read > 100_000:
                read = 0
                time.sleep(0.05)
        assert told.endswith(b"[DONE]\n\n")
        assert time.monotonic() - begun > 0.5
