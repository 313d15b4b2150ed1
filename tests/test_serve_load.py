"""Many clients at once: nobody gets another's words, and the server neither grows nor slows down."""

import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gptoss_lite.engine import Engine
from gptoss_lite.serve.app import create_app
from gptoss_lite.serve.settings import Settings
from tests.raw_http import Raw, head, parse
from tests.talker import CHAT, running, wait_until

COMMAND = "from gptoss_lite.cli.main import main; main(prog_name='gptoss-lite')"
CLIENTS = 64
SECONDS, WARM_UP = 120, 20
CONNECTIONS = 10_000
TEXTS = (
    "Tell me a story about the sea.",
    "What is a lighthouse?",
    "Say hello. " * 30,
    "Count the ships, and think.",
)
TOOL = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}

# What differs from run to run: names, times, and what happened to be in the cache.
PASSING = re.compile(
    rb'"(?:id|item_id|call_id|created|created_at|completed_at|cached_tokens)":(?:"[^"]*"|\d+)|^: .*\n\n', re.M
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the answer that it has when nobody else asks."""

    path: str
    body: bytes

    async def answer(self, port: int, leave_after: int | None = None) -> bytes:
        """Ask; return the answer's body without what differs from run to run.

        leave_after: go after so many bytes, with nothing.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head("POST", self.path, len(self.body), connection="close") + self.body)
            if leave_after is not None:
                await reader.read(leave_after)
                return b""
            reply = parse(await reader.read())
        finally:
            writer.close()
        assert reply.status == 200, reply.body
        # choices are told of side by side, in whatever order they come
        events: list[bytes] = PASSING.sub(b"", reply.body).split(b"\n\n")
        events.sort(key=_choice)
        return b"\n\n".join(events)


def _choice(event: bytes) -> int:
    found = re.search(rb'"choices":\[\{"index":(\d+)', event)
    return int(found[1]) if found else CLIENTS


def requests(model: str, seeds: Sequence[int]) -> list[Asked]:
    """Return requests of every kind, with some tokens of answer each."""
    asked = []
    for number, (seed, text) in enumerate((seed, text) for seed in seeds for text in TEXTS):
        common = {"model": model, "seed": seed, "stream": number % 2 == 0}
        response = common | {"input": text, "max_output_tokens": 40}
        chat = common | {
            "messages": [{"role": "user", "content": text}],
            "max_completion_tokens": 40 + number,
        }
        form = {"type": "json_schema", "json_schema": {"name": "place", "schema": TOOL["parameters"]}}
        bodies: list[tuple[str, dict[str, Any]]] = [
            (CHAT, chat | {"n": 2}),
            (CHAT, chat | {"logprobs": True, "top_logprobs": 2}),
            (CHAT, chat | {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}),
            (CHAT, chat | {"response_format": form, "reasoning_budget": 10}),
            ("/v1/responses", response),
            ("/v1/responses", response | {"tools": [{"type": "function", **TOOL}]}),
            ("/v1/completions", common | {"prompt": [text, text[:9]], "max_tokens": 30, "stop": " the end"}),
        ]  # fmt: skip
        asked += [Asked(path, json.dumps(body).encode()) for path, body in bodies]
    return asked


async def alone(port: int, asked: Sequence[Asked]) -> dict[Asked, bytes]:
    """Ask one after another."""
    return {one: await one.answer(port) for one in asked}


async def together(
    port: int, twins: dict[Asked, bytes], clients: int, done: Callable[[int], bool]
) -> Counter[str]:
    """Let clients ask at random until all is done; count what they met. AssertionError for another answer."""
    met: Counter[str] = Counter()

    async def ask(client: int) -> None:
        random = Random(client)
        while not done(met.total()):
            one = random.choice(list(twins))
            if random.random() < 0.1:
                await one.answer(port, leave_after=random.randrange(2000))
                met["left"] += 1
            else:
                assert await one.answer(port) == twins[one]
                met["the same"] += 1

    async with asyncio.TaskGroup() as group:
        for client in range(clients):
            group.create_task(ask(client))
    return met


@pytest.fixture(scope="module")
def cramped() -> Iterator[tuple[int, Engine]]:
    """The demo model, with a cache in which few of its requests have room."""
    import gptoss_lite

    model, tokenizer = gptoss_lite.load("demo", device="cpu")
    engine = Engine(model, cache_tokens=384, max_sequences=8)
    app = create_app(engine, tokenizer, Settings("demo", date="2026-01-01"))
    with running(app) as port:
        yield port, engine


def test_a_cache_that_is_too_small_costs_time_and_no_text(cramped: tuple[int, Engine]) -> None:
    port, engine = cramped
    twins = asyncio.run(alone(port, requests("demo", [1])[:5]))
    assert engine.statistics.preemptions == 0
    met = asyncio.run(together(port, twins, 8, lambda met: met >= 40 or engine.statistics.preemptions > 1))
    assert engine.statistics.preemptions > 0
    assert met["the same"] > 6
    wait_until(lambda: not engine.has_work)


class Process:
    """The command in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", "--port", "0", "--quiet", "--date", "2026-01-01"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.port = int(self.process.stderr.readline().rsplit(":", 1)[1])

    @property
    def bytes(self) -> int:
        """What it takes of memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def files(self) -> int:
        """How many files, connections among them, it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def metrics(self) -> dict[str, float]:
        """Return its counters and gauges."""
        with Raw(self.port) as raw:
            lines = raw.get("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("gptoss_lite_"): float(value) for name, value in pairs}


@pytest.fixture
def process() -> Iterator[Process]:
    found = Process()
    yield found
    found.process.terminate()
    _, log = found.process.communicate(timeout=60)
    assert (found.process.returncode, log) == (0, "")  # nothing went wrong


@pytest.mark.soak
def test_clients_for_two_minutes_hear_what_each_would_hear_alone(process: Process) -> None:
    twins = asyncio.run(alone(process.port, requests("demo", [1, 2])))
    begun, memory = time.monotonic(), []

    def done(_met: int) -> bool:
        second = time.monotonic() - begun
        if second > WARM_UP:
            memory.append(process.bytes)
        return second > SECONDS

    met = asyncio.run(together(process.port, twins, CLIENTS, done))
    print(f"{met}, memory {memory[0]:,} to {max(memory):,} bytes")
    assert met["the same"] > 1000
    assert max(memory) < 1.05 * memory[0]
    metrics = process.metrics()
    assert metrics["running_requests"] == metrics["waiting_requests"] == 0
    assert (
        metrics["cached_tokens_total"] + metrics["prefilled_tokens_total"] == metrics["prompt_tokens_total"]
    )


@pytest.mark.soak
def test_sixteen_clients_get_far_more_tokens_than_one(process: Process) -> None:
    body = {
        "model": "demo",
        "prompt": TEXTS[0],
        "max_tokens": 200,
        "logit_bias": {"4088": -100},
        "stream": True,
    }
    asked = Asked("/v1/completions", json.dumps(body).encode())

    async def rate(clients: int, each: int) -> float:
        async def ask() -> None:
            for _ in range(each):
                await asked.answer(process.port)

        before, begun = process.metrics()["generated_tokens_total"], time.monotonic()
        await asyncio.gather(*(ask() for _ in range(clients)))
        seconds = time.monotonic() - begun
        return (process.metrics()["generated_tokens_total"] - before) / seconds

    asyncio.run(rate(16, 1))
    one, sixteen = asyncio.run(rate(1, 10)), asyncio.run(rate(16, 5))
    print(f"{one:.0f} tokens/s for one client, {sixteen:.0f} for sixteen: {sixteen / one:.1f} times")
    assert sixteen > 2.5 * one  # a busy machine gives less than the 3.7 times of a quiet one


@pytest.mark.soak
def test_ten_thousand_idle_connections_hold_up_nobody(process: Process) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 100:
        pytest.skip(f"this system lets a process open {hard} files, and {CONNECTIONS} connections are more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle: list[Raw] = []
    try:
        files, memory = process.files, process.bytes
        idle += [Raw(process.port) for _ in range(CONNECTIONS)]
        wait_until(lambda: process.files >= files + CONNECTIONS)
        print(f"{(process.bytes - memory) / CONNECTIONS:,.0f} bytes a connection")
        body = {"model": "demo", "prompt": TEXTS[0], "max_tokens": 20, "seed": 1}
        asked = Asked("/v1/completions", json.dumps(body).encode())
        for _ in range(10):
            begun = time.monotonic()
            asyncio.run(asked.answer(process.port))
            assert time.monotonic() - begun < 1
        time.sleep(25)  # they have 20 seconds to ask for something
        assert process.files <= files + 2
        assert all(raw.is_closed() for raw in idle)
        assert process.bytes < 1.5 * memory
    finally:
        for raw in idle:
            raw.socket.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
