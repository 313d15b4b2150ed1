"""An engine for asyncio: one thread computes for all tasks, and sleeps when there is nothing to do."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeAlias

from gptoss_lite.engine import Engine, Request, TokenEvent
from gptoss_lite.errors import RequestError

Arrival: TypeAlias = "tuple[Run, int, TokenEvent]"  # for whom, of which of its requests


class Run:
    """The requests of one task, from `with engine.run(requests) as run` on; leaving it frees their blocks.

    `async for events in run` gives what has come since the last time, (index of the request, event) each,
    until all have finished. Raises RequestError if the model cannot take a prompt, RuntimeError if the engine
    was closed.
    """

    def __init__(self, engine: "AsyncEngine", requests: Sequence[Request]) -> None:
        self.loop = asyncio.get_running_loop()
        self.requests = requests
        self.request_ids: list[int] = []  # the engine's thread alone uses them
        self._engine = engine
        self._open = set(range(len(requests)))
        self._arrived = asyncio.Event()
        self._events: list[tuple[int, TokenEvent]] = []
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        if not self._engine.ask(lambda: self._engine.submit(self)):
            raise RuntimeError("the engine was closed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for index in list(self._open):
            self.cancel(index)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, TokenEvent]]:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                raise StopAsyncIteration
            await self._arrived.wait()
            self._arrived.clear()
        events, self._events = self._events, []
        self._open.difference_update(index for index, event in events if event.finish_reason is not None)
        return events

    def cancel(self, index: int) -> None:
        """Drop one of the requests; no event of it comes from now on."""
        self._open.discard(index)
        self._events = [(i, event) for i, event in self._events if i != index]
        self._arrived.set()
        self._engine.ask(lambda: self._engine.cancel(self, index))

    def take(self, index: int, event: TokenEvent) -> None:
        """Accept an event; called in the task's own loop."""
        if index in self._open:
            self._events.append((index, event))
            self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Accept that nothing more will come; called in the task's own loop."""
        self._failure = error
        self._arrived.set()


class AsyncEngine:
    """Shares one Engine among tasks; their requests run in the same batches.

    Use it as `async with AsyncEngine(engine) as shared`, or call `close`; the engine belongs to it meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine is a {type(engine).__name__}: give an Engine, as Engine(model)")
        if engine.has_work:
            raise RequestError("the engine has requests under way: give one that is idle")
        self._engine = engine
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._owners: dict[int, tuple[Run, int]] = {}  # of the engine's requests
        self._lock = threading.Lock()  # held to ask for something, and to end
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="gptoss-lite engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @property
    def alive(self) -> bool:
        """Whether it computes: it was not closed, and nothing has stopped it."""
        return not self._ended

    def close(self) -> None:
        """Stop after the current step; what is still under way raises RuntimeError."""
        self.ask(None)
        self._thread.join()

    def run(self, requests: Sequence[Request]) -> Run:
        """Prepare to run requests of the task that asks for it; see Run."""
        return Run(self, requests)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Run a request, event by event; leaving the loop early or cancelling the task frees its blocks.

        Raises what Run raises.
        """
        with self.run([request]) as run:
            async for events in run:
                for _, event in events:
                    yield event

    def ask(self, command: Callable[[], None] | None) -> bool:
        """Hand the thread something to do, None to end; False if it has ended."""
        with self._lock:
            if not self._ended:
                self._commands.put(command)
            return not self._ended

    def submit(self, run: Run) -> None:
        """Begin the requests of a run; in the engine's thread."""
        try:
            for index, request in enumerate(run.requests):
                run.request_ids.append(self._engine.submit(request))
                self._owners[run.request_ids[-1]] = run, index
        except Exception as error:
            self._drop(run)
            _tell(run.loop, run.fail, error)

    def cancel(self, run: Run, index: int) -> None:
        """End one request of a run; in the engine's thread."""
        if index < len(run.request_ids):  # it may never have been accepted
            self._engine.cancel(run.request_ids[index])
            self._owners.pop(run.request_ids[index], None)

    def _drop(self, run: Run) -> None:
        for index in range(len(run.request_ids)):
            self.cancel(run, index)

    def _work(self) -> None:
        failure = RuntimeError("the engine was closed")
        try:
            while self._take_commands():
                self._deliver(self._engine.step())
        except BaseException as error:  # nothing that goes wrong here may leave the clients waiting
            failure = RuntimeError(f"the engine stopped: {error!r}")
            failure.__cause__ = error
        with self._lock:
            self._ended = True
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        for run in {run for run, _ in self._owners.values()}:
            self._drop(run)
            _tell(run.loop, run.fail, failure)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        """Hand a step's events over, waking each loop once; who has no loop any more needs no answer."""
        arrivals: dict[asyncio.AbstractEventLoop, list[Arrival]] = {}
        for event in events:
            run, index = self._owners[event.request_id]
            arrivals.setdefault(run.loop, []).append((run, index, event))
            if event.finish_reason is not None:
                del self._owners[event.request_id]
        for loop, arrived in arrivals.items():
            if not _tell(loop, _take_all, arrived):
                for run in {run for run, _, _ in arrived}:
                    self._drop(run)

    def _take_commands(self) -> bool:
        """Carry out what was asked for, waiting while there is nothing to compute; False once closed."""
        while not (self._engine.has_work and self._commands.empty()):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], argument: object) -> bool:
    """Call a function in a loop of another thread; False if that was closed without a word."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        return False
    return True


def _take_all(arrived: Sequence[Arrival]) -> None:
    for run, index, event in arrived:
        run.take(index, event)
