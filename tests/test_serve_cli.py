"""The serve command: its options, its errors in one line, and its end under load."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import gptoss_lite as gl
from gptoss_lite.cli.main import main
from gptoss_lite.serve import app as app_module
from gptoss_lite.serve import run as run_module
from gptoss_lite.serve.settings import Settings
from tests.raw_http import Raw, Reply, head
from tests.talker import demo_tokenizer

COMMAND = "from gptoss_lite.cli.main import main; main(prog_name='gptoss-lite')"
STREAMS = 4
ENDLESS = {str(demo_tokenizer().special[name]): -100 for name in ("<|return|>", "<|call|>", "<|endoftext|>")}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the command would serve, and how, with nothing loaded."""
    seen: dict[str, Any] = {}

    def create(_engine: object, _tokenizer: object, settings: Settings) -> object:
        seen["settings"] = settings
        return object()

    def run(_app: object, listener: socket.socket, drain_seconds: int, started: Any) -> None:
        seen["address"], seen["drain_seconds"] = listener.getsockname(), drain_seconds
        listener.close()
        started()

    def engine(_model: object, **options: Any) -> object:
        seen["engine"] = options
        return object()

    def load(_path: str, _device: str, **options: Any) -> tuple[object, None]:
        seen["load"] = options
        return SimpleNamespace(ops=SimpleNamespace(name="none")), None

    monkeypatch.setattr(gl, "load", load)
    monkeypatch.setattr("gptoss_lite.engine.Engine", engine)
    monkeypatch.setattr(app_module, "create_app", create)
    monkeypatch.setattr(run_module, "run", run)
    monkeypatch.setattr(run_module, "warm_up", lambda _engine: None)
    monkeypatch.setattr(run_module, "log_to_stderr", lambda *, access: seen.update(access=access))
    with monkeypatch.context() as environment:
        environment.delenv("GPTOSS_LITE_API_KEY", raising=False)
        yield seen


def serve(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", "--port", "0", *arguments], env=environment)


def test_by_default_only_this_machine_is_served(served: dict[str, Any]) -> None:
    done = serve()
    assert done.exit_code == 0, done.output
    settings = served["settings"]
    assert served["address"][0] == "127.0.0.1"
    assert settings == Settings("demo", allowed_hosts=("127.0.0.1", "::1", "localhost"))
    assert served["drain_seconds"] == 30
    assert served["engine"] == {"max_sequences": 16}
    assert served["access"]
    assert re.fullmatch(r"Serving demo on http://127\.0\.0\.1:\d+\n", done.output)


def test_options_arrive_where_they_belong(served: dict[str, Any]) -> None:
    done = serve(
        *("--name", "gpt-oss", "--max-waiting", "7", "--max-body", "1MB", "--max-seconds", "90", "--quiet"),
        *(
            "--drain-seconds",
            "5",
            "--cors-origin",
            "https://a",
            "--cors-origin",
            "https://b",
            "--date",
            "2026-01-02",
        ),
        *("--allowed-host", "box", "--reasoning-content", "--max-sequences", "3", "--cache-tokens", "999"),
    )
    assert done.exit_code == 0, done.output
    assert served["settings"] == Settings(
        "gpt-oss", max_waiting=7, max_body=1 << 20, max_seconds=90, cors_origins=("https://a", "https://b"),
        allowed_hosts=("127.0.0.1", "::1", "localhost", "box"), reasoning_content=True, date="2026-01-02",
    )  # fmt: skip
    assert (served["drain_seconds"], served["access"]) == (5, False)
    assert (served["engine"]["max_sequences"], served["load"]["cache_tokens"]) == (3, 999)


def test_whoever_opens_the_server_to_others_is_told_what_that_means(served: dict[str, Any]) -> None:
    note = "anybody who can reach this machine may ask"
    assert note in serve("--host", "0.0.0.0").output
    assert served["settings"].allowed_hosts == ()
    assert note not in serve("--host", "0.0.0.0", "--api-key", "sk-1").output


def test_keys_come_from_options_and_a_file(served: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-3\n\n  sk-4  \r\n")
    done = serve("--api-key", "sk-1", "--api-key", "sk-2", "--api-key-file", str(file))
    assert done.exit_code == 0, done.output
    assert served["settings"].api_keys == ("sk-1", "sk-2", "sk-3", "sk-4")
    assert "sk-" not in done.output


def test_keys_come_from_the_environment(served: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-3")
    serve("--api-key-file", str(file), GPTOSS_LITE_API_KEY="sk-1 sk-2")
    assert served["settings"].api_keys == ("sk-1", "sk-2", "sk-3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no key: write one a line"),
        (b"# none\n\n", "has no key: write one a line"),
        (b"\xff\n", "is not UTF-8: byte 0xff at position 0"),
        (b"sk-1 sk-2\n", "an API key may have printable ASCII characters only, and no spaces"),
        ("schl\u00fcssel\n".encode(), "an API key may have printable ASCII characters only, and no spaces"),
    ],
)
def test_a_file_without_good_keys_is_refused(
    served: dict[str, Any], tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    done = serve("--api-key-file", str(file))
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert message in done.output
    assert not served


@pytest.mark.parametrize("key", ["", " ", "a b", "\u00fc", "a\nb", "\x7f"])
def test_a_key_that_cannot_be_sent_is_refused(served: dict[str, Any], key: str) -> None:
    done = serve("--api-key", key)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert not served


@pytest.mark.parametrize(
    "origin",
    ["", "app", "app.example", "https://", "https://app.example/", "https://APP.example", "null", "*."],
)
def test_an_origin_that_no_browser_sends_is_refused(served: dict[str, Any], origin: str) -> None:
    done = serve("--cors-origin", origin)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert f"{origin!r} is no origin: give scheme://host" in done.output
    assert not served


@pytest.mark.parametrize(
    "origin", ["*", "http://localhost:3000", "https://app.example", "chrome-extension://abc"]
)
def test_an_origin_that_browsers_send_is_taken(served: dict[str, Any], origin: str) -> None:
    assert serve("--cors-origin", origin).exit_code == 0
    assert served["settings"].cors_origins == (origin,)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "65536"), ("--port", "http"), ("--port", "-1"), ("--max-sequences", "0"), ("extra",),
        ("--max-waiting", "-1"), ("--max-body", "0"), ("--max-body", "much"), ("--max-seconds", "0"),
        ("--max-seconds", "nan"), ("--drain-seconds", "-1"), ("--drain-seconds", "nan"), ("--nonsense",),
        ("--drain-seconds", "inf"), ("--date", "today"), ("--api-key-file", "/nowhere"), ("--device", "tpu"),
        ("--api-key-file", "/"), ("--cache-tokens", "0"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_option_is_told_with_exit_code_2(served: dict[str, Any], arguments: tuple[str, ...]) -> None:
    assert serve(*arguments).exit_code == 2
    assert not served


@pytest.mark.parametrize("host", ["127.0.0.1", "no such host", "host.invalid", "203.0.113.1"])
def test_an_address_that_cannot_be_had_is_told_in_one_line(served: dict[str, Any], host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--port", str(port), "--host", host)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert done.output.startswith(f"Error: {host}:{port} cannot be listened on: ")
    assert not served  # nothing was loaded in vain


def test_a_missing_package_is_told_in_one_line() -> None:
    names = ["starlette", "uvicorn", "httptools", "prometheus_client", "msgspec"]
    code = f"""
import os, sys
from gptoss_lite.cli.main import main
for name in {names}:
    if os.fork() == 0:
        sys.modules[name] = None
        main(["serve"])
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        f"Error: serve needs {name}: pip install 'gptoss-lite[serve]'" for name in names
    ]


class Server:
    """The command in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                COMMAND,
                "serve",
                "--port",
                "0",
                "--max-sequences",
                str(STREAMS),
                *arguments,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert self.process.stderr is not None
        self.port = int(self.process.stderr.readline().rsplit(":", 1)[1])

    def ask(self, **fields: Any) -> Raw:
        """Send a request for a completion that goes on as long as it may."""
        raw = Raw(self.port)
        raw.post("/v1/completions", {"model": "demo", "prompt": "The sea", "logit_bias": ENDLESS, **fields})
        return raw

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Wait for the process to end; return its exit code and its log."""
        _, log = self.process.communicate(timeout=10)
        return self.process.returncode, [json.loads(line) for line in log.splitlines() if line]


@contextmanager
def running(*arguments: str) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@contextmanager
def replies(raws: list[Raw]) -> Iterator[list[Reply]]:
    """Read several answers side by side; they are all there at the end of the block."""
    found: dict[int, Reply] = {}
    threads = [
        threading.Thread(target=lambda i=i, raw=raw: found.update({i: raw.reply()}))
        for i, raw in enumerate(raws)
    ]
    told: list[Reply] = []
    for thread in threads:
        thread.start()
    yield told
    for thread, raw in zip(threads, raws, strict=True):
        thread.join()
        raw.socket.close()
    told += [found[i] for i in range(len(raws))]


def wait_for_streams(raws: list[Raw]) -> None:
    for raw in raws:
        raw.socket.recv(1, socket.MSG_PEEK)


def reason(reply: Reply) -> str:
    """Return why a stream ended, which it did properly."""
    assert reply.events[-1] == "[DONE]"
    reasons = [event["choices"][0]["finish_reason"] for event in reply.events[:-1]]
    assert set(reasons[:-1]) <= {None}
    return str(reasons[-1])


def test_a_server_told_to_stop_lets_answers_come_to_their_ends() -> None:
    with running() as server:
        raws = [server.ask(stream=True, max_tokens=500) for _ in range(STREAMS)]
        kept = Raw(server.port)
        assert kept.get("/health").status == 200
        late = Raw(server.port)
        late.send(head("POST", "/v1/completions", 100))
        wait_for_streams(raws)
        with replies(raws) as told:
            server.process.send_signal(signal.SIGTERM)
            assert kept.is_closed()
            with pytest.raises(ConnectionRefusedError):
                Raw(server.port)
            late.send(b'{"model": "demo", "prompt": "The sea"}'.ljust(100))
            refusal = late.reply()
        code, log = server.end()
        kept.socket.close()
        late.socket.close()
    assert (refusal.status, refusal.headers["retry-after"]) == (503, "5")
    assert code == 0
    assert [reason(reply) for reply in told] == ["length"] * STREAMS
    assert [line["completion_tokens"] for line in log if "completion_tokens" in line] == [500] * STREAMS


def test_answers_that_take_too_long_are_ended_properly() -> None:
    with running("--drain-seconds", "1") as server:
        raws = [server.ask(stream=True) for _ in range(STREAMS)]
        wait_for_streams(raws)
        waiting = [server.ask(stream=True), server.ask(), server.ask(n=2)]
        time.sleep(0.1)
        with replies(raws + waiting) as told:
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
        assert 0.9 < time.monotonic() - begun < 4
        code, log = server.end()
    assert code == 0
    assert [reason(reply) for reply in told[: STREAMS + 1]] == ["length"] * (STREAMS + 1)
    reasons = [choice["finish_reason"] for reply in told[STREAMS + 1 :] for choice in reply.json["choices"]]
    assert reasons == ["length"] * 3
    assert len(log) == STREAMS + 3


def test_a_second_interrupt_ends_at_once() -> None:
    with running() as server:
        raws = [server.ask(stream=True) for _ in range(STREAMS)]
        wait_for_streams(raws)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        server.process.communicate(timeout=10)
        assert time.monotonic() - begun < 3
        assert server.process.returncode == 130
        for raw in raws:
            raw.socket.close()
