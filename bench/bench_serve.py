"""What the server costs beside its engine, and what a batch gains: the same answers of both, in turns.

The demo model's token takes a fraction of a millisecond, so that what stands around it shows.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from statistics import median
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import gptoss_lite
from gptoss_lite.engine import Engine, Request
from gptoss_lite.harmony import from_chat, render_prompt
from gptoss_lite.sampling import SamplingParams
from gptoss_lite.serve.run import warm_up
from gptoss_lite.tokenizer import Tokenizer

TOKENS, ROUNDS, MANY = 65, 20, 16
DATE, MESSAGES = "2026-01-01", [{"role": "user", "content": "Tell me a story about the sea."}]
COMMAND = "from gptoss_lite.cli.main import main; main()"
ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")  # forbidden, so that answers are as long as they may be
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


@contextmanager
def served(threads: int) -> Iterator[int]:
    """Run the command on the demo model; yields its port."""
    arguments = ["serve", "--port", "0", "--quiet", "--date", DATE, "--threads", str(threads)]
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        yield int(process.stderr.readline().rsplit(":", 1)[1])
        process.terminate()


def body(tokenizer: Tokenizer, max_tokens: int) -> bytes:
    """Return a whole request for a stream of so many tokens."""
    fields = {"model": "demo", "messages": MESSAGES, "max_tokens": max_tokens, "seed": 1, "stream": True}
    data = json.dumps(fields | {"logit_bias": {str(tokenizer.special[end]): -100 for end in ENDS}}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + data


def ask(sockets: list[socket.socket], request: bytes) -> int:
    """Send a request on every connection and read all answers, side by side; return their bytes."""
    read, waiting = 0, len(sockets)
    with selectors.DefaultSelector() as selector:
        for connection in sockets:
            selector.register(connection, selectors.EVENT_READ, connection)
            connection.sendall(request)
        while waiting:
            for key, _ in selector.select():
                part: bytes = key.data.recv(1 << 16)
                read += len(part)
                waiting -= part.endswith(END)
    return read


def timed(work: Callable[..., object], *arguments: Any) -> float:
    """Return the seconds that something takes."""
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_serve(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], threads: int) -> None:
    """Streams of chats over HTTP, and the same requests of an engine in this process; one client and many."""
    model, tokenizer = gptoss_lite.load("demo", device="cpu", threads=threads)
    engine = Engine(model)
    warm_up(engine)
    prompt = render_prompt(from_chat(MESSAGES, date=DATE), tokenizer)
    sampling = SamplingParams(logit_bias={tokenizer.special[end]: -100.0 for end in ENDS})
    seeds = count()

    def compute(clients: int, max_tokens: int) -> None:
        for _ in range(clients):
            engine.submit(Request(prompt, sampling, next(seeds), max_tokens))
        tokens = 0
        while engine.has_work:
            tokens += len(engine.step())
        assert tokens == clients * max_tokens

    cases = [(clients, length) for clients in (1, MANY) for length in (1, TOKENS)]
    server: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    alone: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    with ExitStack() as stack:
        port = stack.enter_context(served(threads))
        own = stack.enter_context(ThreadPoolExecutor(1))  # the server's engine has a thread of its own, too
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(MANY)]
        requests = {length: body(tokenizer, length) for length in (1, TOKENS)}

        def compute_aside(clients: int, length: int) -> None:
            own.submit(compute, clients, length).result()

        for _ in range(ROUNDS):
            for clients, length in cases:
                ask(sockets[:1], requests[1])  # each right after a short one of its own: neither is asleep
                server[clients, length].append(timed(ask, sockets[:clients], requests[length]))
                compute_aside(1, 1)
                alone[clients, length].append(timed(compute_aside, clients, length))
        read = benchmark.pedantic(ask, (sockets[:1], requests[TOKENS]), rounds=5)
    assert read > TOKENS * 100  # a chunk a token

    def over(clients: int, length: int) -> float:
        pairs = zip(server[clients, length], alone[clients, length], strict=True)
        return median(ours - engines for ours, engines in pairs)

    def rate(times: dict[tuple[int, int], list[float]], clients: int) -> float:
        return clients * (TOKENS - 1) / (median(times[clients, TOKENS]) - median(times[clients, 1]))

    with capsys.disabled():
        print(f"\n{threads} threads; the server takes more than the engine:")
        for clients in (1, MANY):
            each = over(clients, 1) / clients
            token = (over(clients, TOKENS) - over(clients, 1)) / (TOKENS - 1) / clients
            benchmark.extra_info[f"of {clients}"] = {"request_ms": 1e3 * each, "token_us": 1e6 * token}
            print(f"{clients:4} clients: {1e3 * each:.2f} ms a request, {1e6 * token:.0f} us a token")
        for name, times in (("engine", alone), ("server", server)):
            one, many = rate(times, 1), rate(times, MANY)
            benchmark.extra_info[name] = {"one": one, "many": many}
            print(f"{name}: {one:.0f} tokens/s for one, {many:.0f} for {MANY}: {many / one:.2f} times")
