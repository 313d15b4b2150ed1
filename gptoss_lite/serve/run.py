"""Running the application on a socket, until a signal says that it is enough."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from gptoss_lite.engine import Engine, Request
from gptoss_lite.errors import RequestError
from gptoss_lite.sampling import SamplingParams
from gptoss_lite.serve.protocol import Config, Protocol
from gptoss_lite.serve.service import Service

_BACKLOG = 2048
_LAST_WRITES = 2  # seconds, for what was cut to be told


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before anything that takes long; nobody can connect yet. RequestError if it is taken."""
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as failing:
            listener = failing.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            failing.pop_all()
    except OSError as error:
        raise RequestError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from None
    return listener


def run(app: Starlette, listener: socket.socket, drain_seconds: int, started: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT; then let what is under way come to its end.

    After `drain_seconds` answers end where they stand, properly: each stream gets its finish reason. A second
    signal ends at once. started: called when clients can connect.
    """
    allow_open_files()
    gc.collect()
    gc.freeze()  # what is there by now stays, and no collection has to walk through it while all wait
    server = make_server(app, drain_seconds, started)
    signal.signal(signal.SIGTERM, server.handle_exit)  # raised anew once all is done, which is no failure
    server.run(sockets=[listener])


def make_server(app: Starlette, drain_seconds: int, started: Callable[[], None]) -> uvicorn.Server:
    """Make the server that `run` runs."""
    config = Config(
        app,
        http=Protocol,
        loop="asyncio",
        ws="none",
        backlog=_BACKLOG,
        timeout_keep_alive=app.state.service.settings.idle_seconds,
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=drain_seconds + _LAST_WRITES,
    )
    config.settings = app.state.service.settings
    return _Server(config, app.state.service, drain_seconds, started)


def allow_open_files() -> None:
    """Raise the limit of open files as far as this process may: each connection is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def warm_up(engine: Engine) -> None:
    """Let an engine answer prompts of several lengths, so that nobody waits for what is done only once."""
    sampling = SamplingParams(logprobs=1)
    for length in (1, 2, 4, 8, 64):
        if length < engine.context:
            engine.submit(Request([0] * length, sampling, seed=0, max_tokens=2, cache_salt=b"warm-up"))
    while engine.has_work:
        engine.step()


def log_to_stderr(*, access: bool) -> None:
    """Write what goes wrong, and access lines, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    levels = {
        "gptoss_lite.access": logging.INFO if access else logging.WARNING,
        "uvicorn.error": logging.ERROR,
    }
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


class _Server(uvicorn.Server):
    """Drains before it goes."""

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_seconds: int, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers under way, cutting them when their time is up; then shut down."""
        self._service.drain()
        cut = asyncio.get_running_loop().call_later(self._drain_seconds, self._service.cut)
        await super().shutdown(sockets)
        cut.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take note of a signal; SIGTERM is as final as Ctrl-C when it comes twice."""
        if self.should_exit and sig == signal.SIGTERM:
            self.force_exit = True
        super().handle_exit(sig, frame)
