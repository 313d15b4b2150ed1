"""Replicas on Ray Serve: two on this machine, with the bundled model, and what becomes of their clients."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import pytest

pytest.importorskip("msgspec", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
pytest.importorskip("pydantic", reason="the extra ray is not installed")

from prometheus_client.parser import text_string_to_metric_families

import gptoss_lite as gl
from deploy.affinity import CHARACTERS, conversation
from deploy.counting import merged
from deploy.options import Options
from gptoss_lite.harmony.parse import turn_ends
from gptoss_lite.serve.settings import Settings

if TYPE_CHECKING:
    import openai

ROOT = Path(__file__).parents[1]
MODEL = "demo"
KEYS = ("first-key", "second-key")
SEQUENCES = 8  # answers at once, of each replica
START, RECOVERY, DRAIN, STOP = 60, 45, 3, 60  # seconds
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None or find_spec("openai") is None or not sys.platform.startswith("linux"),
    reason="needs the extra ray, openai, and Linux",
)


def chat(*contents: str, **more: Any) -> bytes:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


def test_all_turns_of_a_conversation_have_one_name() -> None:
    first = conversation(b"Bearer a", chat("Be kind.", "Hello?", temperature=1))
    assert first and first == conversation(b"Bearer a", chat("Be kind.", "Hello?", "Hello!", "And then?"))


@pytest.mark.parametrize(
    "key, body",
    [
        (b"Bearer b", chat("Be kind.", "Hello?")),
        (b"Bearer a", chat("Be brief.", "Hello?")),
        (b"Bearer a", chat("Be kind.", "Hello!")),
        (b"Bearer a", json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}).encode()),
    ],
    ids=["another key", "another system message", "another question", "no system message"],
)
def test_another_conversation_has_another_name(key: bytes, body: bytes) -> None:
    assert conversation(key, body) != conversation(b"Bearer a", chat("Be kind.", "Hello?"))


@pytest.mark.parametrize(
    "first, second",
    [
        ({"input": "Hello?"}, {"input": "Hello?", "temperature": 0}),
        ({"input": [{"role": "user", "content": "Hello?"}]},) * 2,
        ({"prompt": "x" * CHARACTERS}, {"prompt": "x" * CHARACTERS + "y"}),
        ({"prompt": [7] * CHARACTERS}, {"prompt": [7] * CHARACTERS + [8]}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * CHARACTERS}]}]},
         {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * CHARACTERS + "y"}]}]}),
    ],
    ids=["input", "input items", "prompt", "token ids", "parts"],
)  # fmt: skip
def test_every_endpoint_s_requests_have_a_beginning(first: dict[str, Any], second: dict[str, Any]) -> None:
    name = conversation(b"", json.dumps(first).encode())
    assert name and name == conversation(b"", json.dumps(second).encode())
    assert name != conversation(
        b"", json.dumps(first).replace("x", "z").replace("7", "9").replace("H", "h").encode()
    )


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"messages": []}', b'{"prompt": 1}']
)
def test_a_body_without_a_beginning_has_no_name(body: bytes) -> None:
    assert conversation(b"Bearer a", body) == ""


def test_counters_of_replicas_are_told_apart() -> None:
    text = (
        '# HELP a_total A.\n# TYPE a_total counter\na_total{path="/"} %d\n# HELP b B.\n# TYPE b gauge\nb %d\n'
    )
    both = merged([("one", text % (1, 2)), ("two", text % (3, 4))]).decode()
    assert both.count("# TYPE a_total counter") == 1
    samples = [sample for family in text_string_to_metric_families(both) for sample in family.samples]
    assert {(s.name, s.labels.get("path"), s.labels["replica"], s.value) for s in samples} == {
        ("a_total", "/", "one", 1), ("a_total", "/", "two", 3), ("b", None, "one", 2), ("b", None, "two", 4),
    }  # fmt: skip


def test_every_setting_of_the_server_is_an_option_of_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_LITE_API_KEY", "from-environment another")
    monkeypatch.setenv("GPTOSS_LITE_MAX_SEQUENCES", "3")
    monkeypatch.setenv("GPTOSS_LITE_MAX_WAITING", "5")
    options = Options.model_validate(
        {
            "replicas": "2",
            "max_waiting": "7",
            "max_body": "2MB",
            "cors_origins": "http://a, http://b",
            "name": "n",
        }
    )
    assert (options.replicas, options.max_sequences) == (2, 3)
    assert options.settings == Settings(
        "n", api_keys=("from-environment", "another"), max_waiting=7, max_body=2 << 20,
        cors_origins=("http://a", "http://b"), allowed_hosts=("127.0.0.1", "::1", "localhost"),
    )  # fmt: skip
    of_the_socket = {"head_seconds", "idle_seconds", "write_seconds"}
    for field in fields(Settings):
        if field.name not in of_the_socket:
            given: Any = Options.model_validate({field.name: getattr(options.settings, field.name)})
            assert getattr(given.settings, field.name) == getattr(options.settings, field.name)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"replica": 2}, "unknown option 'replica': choose from"),
        ({"write_seconds": 5}, "unknown option 'write_seconds'"),
        ({"replicas": 0}, "greater than 0"),
        ({"max_body": "many"}, "'many' is no size of memory"),
        ({"max_waiting": "many"}, "max_waiting"),
        ({"api_keys": ["sk 1"]}, "no spaces"),
        ({"cors_origins": "app.example"}, "'app.example' is no origin"),
        ({"device": "tpu"}, "'cpu' or 'cuda'"),
    ],
)
def test_a_wrong_option_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options.model_validate(given)


class Cluster:
    """`python -m deploy` with two replicas, and what can be seen of it from outside."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = {
            "model": MODEL,
            "replicas": 2,
            "threads": 1,
            "max_sequences": SEQUENCES,
            "max_body": "1MB",
            "drain_seconds": DRAIN,
        }
        application = {"import_path": "deploy.ray_app:build", "name": "tested", "args": arguments}
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        (folder / "config.yaml").write_text(json.dumps(config))  # YAML, too
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy", str(folder / "config.yaml")],
                cwd=ROOT,
                env={
                    **os.environ,
                    "GPTOSS_LITE_API_KEY": " ".join(KEYS),
                    "RAY_TMPDIR": str(folder),
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": secrets.token_hex(32),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._seen = {self._process.pid: Path(f"/proc/{self._process.pid}/stat").read_text().split()[21]}

    def processes(self) -> dict[int, str]:
        """The processes that belong to it, by their ids, with their command lines."""
        there, parents, commands = dict[int, str](), dict[int, int](), dict[int, str]()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid = int(folder.name)
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                there[pid], parents[pid] = (
                    fields[19],
                    int(fields[1]),
                )  # an id may be another's once it is free
                commands[pid] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
        found = {pid for pid, begun in self._seen.items() if there.get(pid) == begun}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        self._seen |= {pid: there[pid] for pid in found}
        return {pid: commands[pid] for pid in found if commands[pid]}  # a zombie has none

    def replicas(self) -> list[int]:
        """The process ids of its replicas."""
        return sorted(pid for pid, command in self.processes().items() if ":tested:Replica" in command)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Ask for a path; return status and body."""
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, headers=headers), timeout=20
            ) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def counted(self, sample: str) -> dict[str, float]:
        """Return one of the counters, by replica."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {
            s.labels["replica"]: s.value for family in families for s in family.samples if s.name == sample
        }

    def running(self) -> dict[str, float]:
        """Return how many requests are in each replica's batch."""
        return self.counted("gptoss_lite_running_requests")

    def healthy(self) -> bool:
        """Whether it answers, with both replicas."""
        assert self._process.poll() is None, self.log.read_text()[-4000:]
        with contextlib.suppress(OSError):
            return self.get("/health")[0] == 200 and len(self.running()) == 2
        return False

    def stop(self) -> None:
        """Ask it to end."""
        self._process.send_signal(signal.SIGTERM)

    def ended(self) -> bool:
        """Whether none of its processes is left."""
        return self._process.poll() is not None and not self.processes()

    def kill(self) -> None:
        """End what is left."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def until(holds: Callable[[], bool], seconds: float) -> float:
    """Wait until something holds; return how long that took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # Ray puts sockets there, whose paths must be short
    started = Cluster(folder)
    try:
        until(started.healthy, START)
        yield started
        if not started.ended():
            started.stop()
            until(started.ended, STOP)
    finally:
        started.kill()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> "Iterator[openai.OpenAI]":
    import openai

    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEYS[0], max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def endless() -> dict[str, int]:
    """A bias against all that ends an answer."""
    _, tokenizer = gl.load(MODEL)
    return {str(token): -100 for token in turn_ends(tokenizer)}


def said(part: Any) -> str:
    """The text of a message or a delta; who leaves something out means nothing."""
    return (getattr(part, "reasoning", None) or "") + (part.content or "")


def story(number: int) -> list[Any]:
    """Begin a conversation that is like no other."""
    return [{"role": "user", "content": f"{number} ships " * 100 + "What became of them?"}]


@needs_ray
@pytest.mark.soak
def test_the_openai_client_streams_through(client: "openai.OpenAI", endless: dict[str, int]) -> None:
    asked: Any = {"model": MODEL, "messages": story(0), "max_tokens": 400, "seed": 1, "logit_bias": endless}
    whole = client.chat.completions.create(**asked)
    arrived, text, usage = [], "", None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        arrived.append(time.monotonic())
        usage = chunk.usage or usage
        text += "".join(said(choice.delta) for choice in chunk.choices)
    assert text == said(whole.choices[0].message)
    assert usage and whole.usage and usage.completion_tokens == whole.usage.completion_tokens == 400
    assert arrived[-1] - arrived[0] > 0.1  # not all at once


@needs_ray
@pytest.mark.soak
def test_a_second_turn_finds_the_first_where_it_was(cluster: Cluster, client: "openai.OpenAI") -> None:
    places = Counter[str]()
    for number in range(1, 40):
        messages, seen = story(number), []
        for _ in range(2):
            before = cluster.counted("gptoss_lite_prompt_tokens_total")
            answer = client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=20, seed=number
            )
            after = cluster.counted("gptoss_lite_prompt_tokens_total")
            [place] = [replica for replica in after if after[replica] > before[replica]]
            assert answer.usage and answer.usage.prompt_tokens_details
            seen.append((place, answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens))
            messages += [
                {"role": "assistant", "content": answer.choices[0].message.content or "They sank."},
                {"role": "user", "content": "And then?"},
            ]
        (first, length, _), (second, _, cached) = seen
        assert first == second
        assert cached and cached > length - 48  # but for the end of a prompt, and a block of the cache
        places[first] += 1
        if len(places) == 2 and number >= 6:
            return
    pytest.fail(f"all conversations went the same way: {places}")


@needs_ray
@pytest.mark.soak
def test_a_conversation_too_much_for_its_replica_is_shared(
    cluster: Cluster, client: "openai.OpenAI", endless: dict[str, int]
) -> None:
    def begin() -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=story(0), max_tokens=3000, logit_bias=endless, stream=True
        )

    streams = [begin() for _ in range(SEQUENCES)]
    until(lambda: sorted(cluster.running().values()) == [0, SEQUENCES], 10)
    streams.append(begin())
    until(lambda: sorted(cluster.running().values()) == [1, SEQUENCES], 10)
    for stream in streams:  # who leaves, frees its place
        stream.close()
    until(lambda: not any(cluster.running().values()), 5)


@needs_ray
@pytest.mark.soak
def test_keys_names_and_limits_are_those_of_the_single_server(cluster: Cluster) -> None:
    import openai

    def refused(body: Any, key: str = KEYS[0]) -> tuple[int, Any]:
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{cluster.url}/v1/chat/completions", data, headers)
        with pytest.raises(HTTPError) as caught:
            urllib.request.urlopen(request, timeout=20)
        with caught.value as error:
            assert len(error.headers.get_all("x-request-id") or ()) == 1
            return error.code, json.load(error)["error"]["code"]

    assert refused({}, "wrong") == (401, "invalid_api_key")
    assert refused({"model": "other", "messages": story(0)}) == (404, "model_not_found")
    assert refused({"model": MODEL, "messages": 1})[0] == 400
    assert refused({"model": "x" * (1 << 20)})[0] == 413
    assert cluster.get("/health") == (200, '{"status":"ok"}')
    assert cluster.get("/v1/models")[0] == 401
    assert cluster.get("/nowhere")[0] == 404
    for path in ("/health", "/metrics"):
        assert cluster.get(path, host="elsewhere.example")[0] == 421
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEYS[1], max_retries=0) as other:
        assert [model.id for model in other.models.list()] == [MODEL]
        answer = other.chat.completions.create(model=MODEL, messages=story(0), max_tokens=1)
        assert answer.usage and answer.usage.prompt_tokens_details
        assert (
            answer.usage.prompt_tokens_details.cached_tokens == 0
        )  # though the first key's cache has all of it


@needs_ray
@pytest.mark.soak
def test_nothing_listens_but_on_this_machine(cluster: Cluster) -> None:
    sockets = set()
    for pid in cluster.processes():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(link))
    addresses = Counter[str]()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:  # it listens
                addresses[columns[1].split(":")[0]] += 1
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert addresses.total() > 5 and set(addresses) <= loopback, addresses


@needs_ray
@pytest.mark.soak
def test_a_killed_replica_takes_its_own_answers_along_and_no_others(
    cluster: Cluster, client: "openai.OpenAI", endless: dict[str, int]
) -> None:
    import openai

    chunks, errors, enough = Counter[int](), dict[int, str](), threading.Event()

    def tell(number: int) -> None:
        asked: Any = {"model": MODEL, "prompt": f"{number}: ", "max_tokens": 100_000, "logit_bias": endless}
        try:
            with client.completions.create(**asked, stream=True) as stream:
                for _ in stream:
                    chunks[number] += 1
                    if enough.is_set():
                        return
        except openai.APIError as error:
            errors[number] = str(error)

    threads: list[threading.Thread] = []
    try:
        while len(threads) < 4 or not all(cluster.running().values()):
            threads.append(threading.Thread(target=tell, args=[len(threads)]))
            threads[-1].start()
            until(lambda: len(chunks) == len(threads), 10)
        before, victims = cluster.running(), cluster.replicas()
        os.kill(victims[0], signal.SIGKILL)
        killed = time.monotonic()
        for number in range(4):
            answer = client.completions.create(model=MODEL, prompt=f"new {number}: ", max_tokens=2)
            assert answer.choices[0].text
        assert time.monotonic() - killed < 10
        until(lambda: len(cluster.running()) == 2 and cluster.running().keys() != before.keys(), RECOVERY)
        [gone] = before.keys() - cluster.running().keys()
        until(lambda: len(errors) == before[gone], 20)
        assert set(errors.values()) == {"the replica that was to answer is gone: ask again"}
        then = chunks.copy()
        others = chunks.keys() - errors.keys()
        until(lambda: all(chunks[number] > then[number] + 20 for number in others), 10)
        assert len(cluster.replicas()) == 2 and victims[0] not in cluster.replicas()
    finally:
        enough.set()
        for thread in threads:
            thread.join()


@needs_ray
@pytest.mark.soak
def test_sigterm_lets_answers_end_and_leaves_no_process(
    cluster: Cluster, client: "openai.OpenAI", endless: dict[str, int]
) -> None:
    import openai

    def begin(length: int) -> Any:
        asked: Any = {"model": MODEL, "prompt": "Last: ", "max_tokens": length, "logit_bias": endless}
        return client.completions.create(**asked, stream=True)

    def refuses() -> bool:
        try:
            begin(1).close()
        except openai.InternalServerError as error:
            return "the server is shutting down" in str(error)
        return False

    short, endless_one = begin(300), begin(100_000)
    chunks = [[next(short)], [next(endless_one)]]
    assert len(cluster.processes()) > 8
    cluster.stop()
    stopped = time.monotonic()
    until(refuses, 5)
    for stream, arrived in zip((short, endless_one), chunks, strict=True):
        arrived += stream
        assert arrived[-1].choices[0].finish_reason == "length"
    assert DRAIN < time.monotonic() - stopped < DRAIN + 10
    assert len(chunks[0]) >= 290  # a chunk holds whole characters, which may be more than one token
    until(cluster.ended, STOP)
