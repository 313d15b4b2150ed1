"""Models by name: what is asked of the hub, and what becomes of it, against a hub that runs here."""

import hashlib
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptoss_lite as gl
from gptoss_lite.hub import DEMO, resolve

pytest.importorskip("huggingface_hub")

COMMAND = "from gptoss_lite.cli.main import main; main(prog_name='gptoss-lite')"
RESOLVE = "import sys; from gptoss_lite.hub import resolve; print(resolve(sys.argv[1]))"
# Chunks as small as these weights, for what has not filled a chunk is lost when a connection is.
SMALL_CHUNKS = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1 << 16;"
ANSWER = ["generate", "Once", "--raw", "--device", "reference", "--seed", "1", "--max-tokens", "4"]
PROGRESS = SMALL_CHUNKS + (
    "import sys; from gptoss_lite.hub import resolve;"
    "calls = []; resolve(sys.argv[1], lambda *call: calls.append([*call])); print(calls)"
)
CONFIG = (DEMO / "config.json").read_bytes()
WEIGHTS = np.random.default_rng(0).bytes(1 << 20)
HALF = len(WEIGHTS) // 2


@dataclass
class Hub:
    """What the server has and does: repositories by name, and what it makes of requests."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)  # of revision main, by repository
    gguf: dict[str, str] = field(default_factory=dict)  # what it tells of the architecture
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # status and code, by file
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    url: str = ""
    cut: int | None = None  # bytes of weights after which it closes the connection, once
    reset: bool = False  # whether it resets the connection then, instead of closing it
    broken: bool = False  # whether it answers 500 after that
    stalled: threading.Event | None = None  # set, instead of closing, when it sends no more

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.repositories[name] = files
        self.commits[name] = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()

    def requested(self, method: str = "GET") -> list[str]:
        """The files asked for, without repository and commit."""
        paths = (re.search(r"/resolve/[^/]+/(.+)", path) for kind, path, _ in self.log if kind == method)
        return sorted(match[1] for match in paths if match)

    def headers(self, path: str) -> list[dict[str, str]]:
        return [headers for method, found, headers in self.log if method == "GET" and path in found]


def large(file: str) -> bool:
    """Whether the hub has a file in its large file storage."""
    return file.endswith((".safetensors", ".gguf", "tokenizer.json"))


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.log.append((self.command, self.path, headers))
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w[^/]*/[^/]+)/revision/([^/]+)", path):
            self.tell(*match.groups())
        elif match := re.fullmatch(r"/(\w[^/]*/[^/]+)/resolve/(\w{40})/(.+)", path):
            self.serve(*match.groups())
        elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self.send_weights(self.hub.repositories[match[1]][match[2]])
        else:
            self.refuse(404, "RepoNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def tell(self, name: str, revision: str) -> None:
        if name not in self.hub.repositories:
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", self.hub.commits[name]):
            return self.refuse(404, "RevisionNotFound")
        siblings = [
            {"rfilename": file, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
            | ({"lfs": {"sha256": sha256(body), "size": len(body), "pointerSize": 9}} if large(file) else {})
            for file, body in self.hub.repositories[name].items()
        ]
        told: dict[str, Any] = {"id": name, "sha": self.hub.commits[name], "siblings": siblings}
        if name in self.hub.gguf:
            told["gguf"] = {"architecture": self.hub.gguf[name]}
        self.send(json.dumps(told).encode(), Content_Type="application/json")

    def serve(self, name: str, commit: str, file: str) -> None:
        if file in self.hub.refused:
            return self.refuse(*self.hub.refused[file])
        body = self.hub.repositories[name][file]
        if not large(file):
            return self.send(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)
        # As the real one, it sends elsewhere for what is large: to another host, and so without the token.
        self.send_response(302)
        self.send_header(
            "Location", f"{self.hub.url.replace('127.0.0.1', 'localhost')}/storage/{name}/{file}"
        )
        self.send_header("X-Linked-Etag", f'"{sha256(body)}"')
        self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_weights(self, body: bytes) -> None:
        if self.hub.cut is None and self.hub.broken:
            return self.refuse(500, "")
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = None
        if self.hub.cut is not None and self.hub.cut < len(body):
            end, self.hub.cut = self.hub.cut, None
        self.wfile.write(body[start:end])
        if end is not None:
            self.wfile.flush()
            if self.hub.stalled is not None:
                self.hub.stalled.set()
                time.sleep(2)
            elif self.hub.reset:
                time.sleep(0.5)  # for all that was sent to be read
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            self.close_connection = True


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Where huggingface_hub finds the hub, and a cache of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return inherited | own | {"NO_PROXY": "*"}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """Run Python code in a process of its own."""

    def run(code: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-W", "error", "-c", code, *arguments]
        return subprocess.run(
            command, env=environment | variables, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    return run


def found(result: "subprocess.CompletedProcess[str]") -> Path:
    """Where `resolve` found the model, and said nothing else."""
    assert (result.returncode, result.stderr) == (0, "")
    return Path(result.stdout.strip())


def refusal(result: "subprocess.CompletedProcess[str]") -> str:
    """The one line that an error is."""
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1].removeprefix("gptoss_lite.errors.CheckpointError: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def single() -> dict[str, bytes]:
    """A repository with one file of weights."""
    return {"config.json": CONFIG, "model.safetensors": WEIGHTS}


def test_a_model_is_downloaded_and_run_by_its_name(hub: Hub, run: Run, tiny_path: Path) -> None:
    hub.add("org/tiny", contents(tiny_path))
    code = "import sys, gptoss_lite as gl; print(gl.load_model(*sys.argv[1:]).logits([1, 2, 3]).tolist())"
    result = run(code, "org/tiny", "reference")
    assert json.loads(result.stdout) == gl.load_model(tiny_path, "reference").logits([1, 2, 3]).tolist()


def test_the_command_line_takes_a_name_and_prints_nothing_but_the_answer(hub: Hub, run: Run) -> None:
    hub.add("org/demo", contents(DEMO))
    result = run(COMMAND, *ANSWER, "--model", "org/demo")
    assert found(result) and result.stdout == run(COMMAND, *ANSWER).stdout


def test_only_what_a_checkpoint_is_read_from_is_requested(hub: Hub, run: Run, tiny_path: Path) -> None:
    texts = dict.fromkeys(["generation_config.json", "chat_template.jinja", "tokenizer.json"], b"{}")
    others = ["README.md", "original/model.safetensors", "metal/model.bin", "pytorch_model.bin", "x.gguf"]
    others += ["a.pt", "original/config.json", "left_over.safetensors", "tokenizer.py"]
    hub.add("org/all", {**contents(tiny_path), **texts, **dict.fromkeys(others, b"no")})
    path = found(run(RESOLVE, "org/all"))
    assert contents(path) == {**contents(tiny_path), **texts}
    assert hub.requested("HEAD") == sorted({*contents(tiny_path), *texts})


def test_what_is_in_the_cache_is_asked_for_once_and_no_more(hub: Hub, run: Run) -> None:
    hub.add("org/model", single())
    path = found(run(RESOLVE, "org/model"))
    hub.log.clear()
    assert found(run(RESOLVE, "org/model")) == path
    assert len(hub.log) == 1


def test_openai_s_own_models_have_short_names(hub: Hub, run: Run) -> None:
    for size in "20b", "120b":
        hub.add(f"openai/gpt-oss-{size}", single())
        assert f"models--openai--gpt-oss-{size}" in str(found(run(RESOLVE, size)))


def test_what_exists_as_a_path_is_never_looked_for_on_the_hub(hub: Hub, run: Run, tmp_path: Path) -> None:
    for name in "20b", "org/model":
        hub.add(name, single())
        (tmp_path / name).mkdir(parents=True)
        assert found(run(RESOLVE, name)) == Path(name)
    assert hub.log == []


@pytest.mark.parametrize("path", ["/no/such/folder", "nothing", "../org/name", "a/b/c", "~/model", "30b"])
def test_what_is_no_name_comes_back_as_it_is(path: str) -> None:
    assert resolve(path) == Path(path)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(gl.CheckpointError, match="empty"):
        resolve("")


@pytest.mark.soak
def test_a_revision_is_a_commit_or_a_branch(hub: Hub, run: Run) -> None:
    hub.add("org/model", single())
    commit = hub.commits["org/model"]
    path = found(run(RESOLVE, f"org/model@{commit}"))
    assert path.name == commit and found(run(RESOLVE, "org/model@main")) == path
    assert "org/model has no revision 'v2'" in refusal(run(RESOLVE, "org/model@v2"))


def test_a_repository_with_original_files_alone_gives_their_folder(hub: Hub, run: Run) -> None:
    files = {f"original/{name}": body for name, body in single().items()}
    hub.add("org/model", {**files, "original/dtypes.json": b"{}", "README.md": b""})
    path = found(run(RESOLVE, "org/model"))
    assert path.name == "original" and contents(path) == single()


def test_a_repository_with_one_gguf_file_gives_that(hub: Hub, run: Run) -> None:
    hub.add("org/model", {"README.md": b"", "model.gguf": WEIGHTS})
    hub.gguf["org/model"] = "gpt-oss"
    path = found(run(RESOLVE, "org/model"))
    assert path.name == "model.gguf" and path.read_bytes() == WEIGHTS
    assert found(run(RESOLVE, "org/model", HF_HUB_OFFLINE="1")) == path


@pytest.mark.soak
def test_of_several_gguf_files_one_must_be_named(hub: Hub, run: Run) -> None:
    hub.add("org/model", {"a.gguf": b"a", "b/c.gguf": b"c", "d-00001-of-00002.gguf": b"d"})
    line = refusal(run(RESOLVE, "org/model"))
    assert "a.gguf, b/c.gguf: name one, as in org/model/a.gguf" in line
    assert "has no x.gguf: it has a.gguf, b/c.gguf" in refusal(run(RESOLVE, "org/model/x.gguf"))
    assert "one part of several" in refusal(run(RESOLVE, "org/model/d-00001-of-00002.gguf"))
    assert hub.requested() == []
    assert found(run(RESOLVE, "org/model/b/c.gguf@main")).read_bytes() == b"c"


@pytest.mark.soak
def test_another_model_is_refused_before_its_weights_are_fetched(hub: Hub, run: Run) -> None:
    hub.add("org/llama", {**single(), "config.json": b'{"model_type": "llama"}'})
    assert "org/llama/config.json: model_type is 'llama'" in refusal(run(RESOLVE, "org/llama"))
    future = {"quantization_config": {"quant_method": "gptoss-lite", "version": 99}}
    hub.add("org/new", {**single(), "config.json": json.dumps({**json.loads(CONFIG), **future}).encode()})
    assert "org/new/config.json: quantization_config.version is 99" in refusal(run(RESOLVE, "org/new"))
    hub.add("org/adapter", {"adapter.safetensors": WEIGHTS})
    assert "org/adapter has no config.json" in refusal(run(RESOLVE, "org/adapter"))
    hub.add("org/gguf", {"model.gguf": WEIGHTS})
    hub.gguf["org/gguf"] = "llama"
    assert "org/gguf: the architecture is 'llama'" in refusal(run(RESOLVE, "org/gguf"))
    hub.add("org/texts", {"README.md": b""})
    assert "org/texts holds no model" in refusal(run(RESOLVE, "org/texts"))
    assert set(hub.requested()) == {"config.json"}


def test_an_index_that_names_what_is_not_there_is_refused_before_the_rest(hub: Hub, run: Run) -> None:
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}).encode()
    hub.add("org/model", {**single(), "model.safetensors.index.json": index})
    assert "names gone.safetensors, which is not there" in refusal(run(RESOLVE, "org/model"))
    assert "model.safetensors" not in hub.requested()


@pytest.mark.soak
@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_is_cut_is_taken_up_where_it_was(hub: Hub, run: Run, reset: bool) -> None:
    hub.add("org/model", single())
    hub.cut, hub.reset = HALF, reset
    calls = json.loads(run(PROGRESS, "org/model").stdout)
    assert calls[-1] == [len(WEIGHTS)] * 2 and calls == sorted(calls)
    assert contents(found(run(RESOLVE, "org/model"))) == single()
    assert [headers.get("range") for headers in hub.headers("/storage/")] == [None, f"bytes={HALF}-"]


def test_a_run_goes_on_where_the_one_before_was_broken_off(hub: Hub, run: Run) -> None:
    hub.add("org/model", single())
    hub.cut, hub.broken = HALF, True
    line = refusal(run(SMALL_CHUNKS + COMMAND, *ANSWER, "--model", "org/model"))
    assert line.startswith("Error: org/model: the download broke off (HfHubHTTPError: ")
    assert line.endswith("run it again, and it goes on from there")
    offline = refusal(run(RESOLVE, "org/model", HF_HUB_OFFLINE="1"))
    assert "org/model is not in the cache" in offline
    hub.broken = False
    hub.log.clear()
    path = found(run(RESOLVE, "org/model"))
    assert contents(path) == single()
    assert [headers["range"] for headers in hub.headers("/storage/")] == [f"bytes={HALF}-"]
    assert not list(path.parent.parent.glob("blobs/*.incomplete"))


@pytest.mark.soak
def test_where_one_file_cannot_be_had_the_others_are_not_gone_on_with(
    hub: Hub, run: Run, environment: dict[str, str]
) -> None:
    hub.add("org/model", {"config.json": CONFIG, "a.safetensors": b"a", "b.safetensors": WEIGHTS})
    hub.refused["a.safetensors"] = 500, ""
    hub.cut, hub.stalled = HALF, threading.Event()
    wait = "import threading; [thread.join(5) for thread in threading.enumerate()[1:]]"
    line = refusal(run(f"{SMALL_CHUNKS}\ntry:\n  {RESOLVE}\nfinally:\n  {wait}", "org/model"))
    assert "500" in line
    blob = Path(environment["HF_HOME"], "hub/models--org--model/blobs", sha256(WEIGHTS))
    assert not blob.exists()


def test_ctrl_c_ends_a_download_at_once_and_keeps_what_has_come(
    hub: Hub, run: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.add("org/model", single())
    hub.cut, hub.stalled = HALF, threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_CHUNKS + COMMAND, *ANSWER, "--model", "org/model"],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )
    assert hub.stalled.wait(30)
    partial = next(iter((tmp_path / "home/hub/models--org--model/blobs").glob("*.incomplete")))
    deadline = time.monotonic() + 10
    while partial.stat().st_size < HALF and time.monotonic() < deadline:
        time.sleep(0.01)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"\n"
    assert process.returncode == 130 and time.monotonic() - start < 3
    hub.stalled = None
    hub.log.clear()
    assert contents(found(run(RESOLVE, "org/model"))) == single()
    assert hub.headers("/storage/")[0]["range"] == f"bytes={HALF}-"


@pytest.mark.soak
@pytest.mark.parametrize("remains", [b"x" * HALF, WEIGHTS[:-1] + b"x", WEIGHTS + b"x"])
def test_a_half_file_that_is_not_of_these_weights_is_found_out(
    hub: Hub, run: Run, environment: dict[str, str], remains: bytes
) -> None:
    hub.add("org/model", single())
    hub.refused["model.safetensors"] = 500, ""
    refusal(run(RESOLVE, "org/model"))
    hub.refused.clear()
    (partial,) = Path(environment["HF_HOME"]).rglob("*.incomplete")
    partial.write_bytes(remains)
    result = run(RESOLVE, "org/model")
    if len(remains) <= len(WEIGHTS):
        assert "org/model/model.safetensors arrived damaged" in refusal(result)
        result = run(RESOLVE, "org/model")
    assert contents(found(result)) == single()


@pytest.mark.soak
def test_progress_ends_with_all_bytes_of_weights_and_goes_on_from_those_there(hub: Hub, run: Run) -> None:
    hub.add("org/model", {**single(), "tokenizer.json": b"{}"})
    total = len(WEIGHTS)
    hub.cut, hub.broken = HALF, True
    refusal(run(SMALL_CHUNKS + RESOLVE, "org/model"))
    hub.broken = False
    result = run(PROGRESS, "org/model")
    assert result.stderr == ""
    calls = json.loads(result.stdout)
    assert calls[:2] == [[0, total], [HALF, total]] and calls[-1] == [total, total] and calls == sorted(calls)
    assert run(PROGRESS, "org/model").stdout == f"[[{total}, {total}]]\n"


@pytest.mark.soak
def test_a_terminal_sees_one_bar_and_none_of_huggingface_hub_s(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.add("org/demo", contents(DEMO))
    hub.cut, hub.stalled = HALF, threading.Event()
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_CHUNKS + COMMAND, *ANSWER, "--model", "org/demo"],
        env={**environment, "TERM": "xterm"},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    seen = ""
    with suppress(OSError):  # Linux's way to say that the other end is closed
        while data := os.read(master, 4096):
            seen += data.decode()
    os.close(master)
    assert process.wait(30) == 0
    assert "Downloading org/demo" in seen and "0.5/6.6 MiB" in seen
    assert "config.json" not in seen and "B/s" not in seen


def test_a_disk_that_is_too_full_is_noticed_before_the_weights(hub: Hub, run: Run) -> None:
    hub.add("org/model", single())
    code = (
        "import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=1 << 19);" + RESOLVE
    )
    line = refusal(run(code, "org/model"))
    assert "org/model takes 0.001 GiB more" in line and "set HF_HOME" in line
    assert "model.safetensors" not in hub.requested()


def test_where_the_cache_has_no_links_the_weights_are_there_once(hub: Hub, run: Run) -> None:
    hub.add("org/model", single())
    path = found(run(RESOLVE, "org/model", HF_HUB_DISABLE_SYMLINKS="1"))
    assert contents(path) == single()
    files = [file for file in path.parents[1].rglob("*") if not file.is_symlink()]
    assert sum(file.stat().st_size > HALF for file in files) == 1


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: Hub, run: Run) -> None:
    hub.add("org/model", single())
    found(run(RESOLVE, "org/model", HF_TOKEN="hf_secret"))
    sent = {"/storage/" in path: headers.get("authorization") for _, path, headers in hub.log}
    assert sent == {False: "Bearer hf_secret", True: None}


def unreachable() -> str:
    """The address of a server that there is none at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


OFFLINE = [
    ({"HF_ENDPOINT": unreachable()}, "ConnectError: "),
    ({"HF_ENDPOINT": "http://no.such.host.invalid"}, "ConnectError: "),
    ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
]


@pytest.mark.parametrize(("variables", "why"), OFFLINE)
def test_offline_a_model_that_was_never_downloaded_is_one_line_at_once(
    run: Run, variables: dict[str, str], why: str
) -> None:
    start = time.monotonic()
    result = run(COMMAND, *ANSWER, "--model", "20b", **variables)
    assert time.monotonic() - start < 5
    assert result.stderr.count("\n") == 1
    line = refusal(result)
    assert line.startswith(
        f"Error: openai/gpt-oss-20b is not in the cache, and the hub cannot be reached ({why}"
    )


@pytest.mark.parametrize(("variables", "_why"), OFFLINE)
def test_offline_a_model_in_the_cache_is_found(
    hub: Hub, run: Run, variables: dict[str, str], _why: str
) -> None:
    hub.add("org/model", single())
    path = found(run(RESOLVE, "org/model"))
    start = time.monotonic()
    assert found(run(RESOLVE, "org/model", **variables)) == path
    assert time.monotonic() - start < 5
    (path / "config.json").unlink()
    assert "is not in the cache" in refusal(run(RESOLVE, "org/model", **variables))


@pytest.mark.soak
def test_a_hub_that_does_not_answer_is_not_waited_for_longer_than_asked(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        assert "the hub cannot be reached (TimeoutError)" in refusal(run(RESOLVE, "org/model", **where))
        assert time.monotonic() - start < 8


@pytest.mark.soak
def test_an_index_in_the_cache_is_not_enough_without_what_it_lists(
    hub: Hub, run: Run, tiny_path: Path
) -> None:
    hub.add("org/tiny", contents(tiny_path))
    path = found(run(RESOLVE, "org/tiny"))
    assert found(run(RESOLVE, "org/tiny", HF_HUB_OFFLINE="1")) == path
    (path / "model-00001-of-00002.safetensors").unlink()
    assert "is not in the cache" in refusal(run(RESOLVE, "org/tiny", HF_HUB_OFFLINE="1"))


@pytest.mark.soak
def test_offline_an_update_that_was_broken_off_leaves_the_model_there_was(hub: Hub, run: Run) -> None:
    hub.add("org/model", single())
    path = found(run(RESOLVE, "org/model"))
    hub.add("org/model", {**single(), "model.safetensors": WEIGHTS[::-1], "tokenizer.json": b"{}"})
    hub.refused["model.safetensors"] = 500, ""
    refusal(run(RESOLVE, "org/model"))
    assert found(run(RESOLVE, "org/model", HF_HUB_OFFLINE="1")) == path


@pytest.mark.parametrize("name", ["org/nothing", "org/nothing/file.gguf@v1", "runs/not--allowed"])
def test_a_name_that_nothing_has_is_one_line(run: Run, name: str) -> None:
    line = refusal(run(RESOLVE, name))
    assert re.match(r"\w+/[\w-]+ does not exist, neither as a path here nor on the hub", line)


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (403, ""), (401, "")])
def test_a_gated_repository_is_one_line_that_says_where_to_ask(
    hub: Hub, run: Run, status: int, code: str
) -> None:
    hub.add("org/model", single())
    hub.refused["config.json"] = status, code
    result = run(COMMAND, *ANSWER, "--model", "org/model")
    assert result.stderr == (
        f"Error: org/model is gated, and the hub refuses its files: ask for access at {hub.url}/org/model, "
        "then set HF_TOKEN or run `hf auth login`\n"
    )


def test_without_huggingface_hub_a_name_is_one_line_that_says_what_to_install(run: Run) -> None:
    result = run("import sys; sys.modules['huggingface_hub'] = None;" + COMMAND, *ANSWER, "--model", "20b")
    assert result.stderr == (
        "Error: 20b is no path, and to download it takes huggingface_hub: pip install 'gptoss-lite[hub]'\n"
    )
    assert result.returncode == 1


def test_huggingface_hub_is_not_imported_before_it_is_needed(run: Run) -> None:
    result = run(RESOLVE + "; print('huggingface_hub' in sys.modules)", "demo")
    assert found(result) and result.stdout == f"{DEMO}\nFalse\n"
