"""An engine for asyncio: one thread computes for all tasks, and sleeps when there is nothing to do."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from gptoss_lite.engine import Engine, Request, TokenEvent
from gptoss_lite.errors import RequestError

Deliver = Callable[[TokenEvent | Exception], bool]


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
        self._deliveries: dict[int, Deliver] = {}
        self._lock = threading.Lock()  # held to ask for something, and to end
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="gptoss-lite engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stop after the current step; streams still open raise RuntimeError."""
        self._ask(None)
        self._thread.join()

    def _ask(self, command: Callable[[], None] | None) -> bool:
        """Hand the thread something to do; False if it has ended."""
        with self._lock:
            if not self._ended:
                self._commands.put(command)
            return not self._ended

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Run a request, event by event; leaving the loop early or cancelling the task frees its blocks.

        Raises RequestError if the model cannot take the prompt.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        request_ids: list[int] = []

        def deliver(event: TokenEvent | Exception) -> bool:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, event)
            except RuntimeError:  # the loop was closed without a word
                return False
            return True

        def submit() -> None:
            try:
                request_ids.append(self._engine.submit(request))
            except Exception as error:
                deliver(error)
            else:
                self._deliveries[request_ids[0]] = deliver

        def cancel() -> None:
            for request_id in request_ids:
                self._engine.cancel(request_id)
                self._deliveries.pop(request_id, None)

        if not self._ask(submit):
            raise RuntimeError("the engine was closed")
        try:
            while True:
                event = await inbox.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._ask(cancel)

    def _run(self) -> None:
        failure = RuntimeError("the engine was closed")
        try:
            while self._take_commands():
                for event in self._engine.step():
                    delivered = self._deliveries[event.request_id](event)
                    if event.finish_reason is not None or not delivered:
                        del self._deliveries[event.request_id]
                        self._engine.cancel(event.request_id)
        except BaseException as error:  # nothing that goes wrong here may leave the clients waiting
            failure = RuntimeError(f"the engine stopped: {error!r}")
            failure.__cause__ = error
        with self._lock:
            self._ended = True
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        for request_id, deliver in self._deliveries.items():
            self._engine.cancel(request_id)
            deliver(failure)

    def _take_commands(self) -> bool:
        """Carry out what was asked for, waiting while there is nothing to compute; False once closed."""
        while not (self._engine.has_work and self._commands.empty()):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True
