"""`gptoss-lite chat`: a conversation, a line a turn."""

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import click

from gptoss_lite.cli.options import EFFORTS, chat_options, decode, model_options, sampling_options
from gptoss_lite.cli.printing import Printer, one_line
from gptoss_lite.cli.progress import Loaded, Loader, stream
from gptoss_lite.errors import GptOssError

if TYPE_CHECKING:
    from gptoss_lite.generation import GenerateOptions
    from gptoss_lite.harmony import Message

HELP = """\
/reset                      forget the conversation
/reasoning low|medium|high  how long to think before the next answers
/save FILE                  write the conversation, one JSON message a line
/exit                       leave, as Ctrl-D does
Ctrl-C stops an answer and keeps what has come of it. A line that begins with a space is never a command."""


class Session:
    """A conversation with one model, whose cache is kept from turn to turn."""

    def __init__(self, loaded: Loaded, options: "GenerateOptions") -> None:
        from gptoss_lite.engine import Engine

        self._options = options
        self._loaded = loaded
        self._engine = Engine(loaded[0], max_sequences=1)
        self.messages: list[dict[str, str] | Message] = []

    def answer(self, text: str) -> None:
        """Print the answer to a user's message; the turn joins the conversation if any answer has come."""
        question = {"role": "user", "content": text}
        printer, answer = Printer(), ""
        turn: tuple[Message, ...] = ()
        with _noted_interrupt() as interrupted:
            for event in stream(
                self._loaded,
                messages=[*self.messages, question],
                engine=self._engine,
                interrupted=interrupted,
                **self._options,
            ):
                printer.show(event)
                answer += event.text if event.is_content else ""
                turn = event.messages
        printer.finish()
        if turn:
            self.messages += [question, *turn]
        elif answer:
            self.messages += [question, {"role": "assistant", "content": answer}]
        else:
            click.echo("Note: stopped before the answer; the question is forgotten.", err=True)

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; return whether the conversation goes on."""
        match line.split(maxsplit=1):
            case ["/exit"]:
                return False
            case ["/help"]:
                click.echo(HELP)
            case ["/reset"]:
                self.messages.clear()
            case ["/reasoning", effort] if effort in EFFORTS:
                self._options["reasoning_effort"] = effort
            case ["/reasoning", *_]:
                _complain(f"/reasoning takes {', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}")
            case ["/save", name]:
                self.save(Path(os.path.expanduser(name)))
            case ["/save"]:
                _complain("/save takes the name of a file")
            case _:
                _complain(f"{line!r} is no command: /help lists them")
        return True

    def save(self, path: Path) -> None:
        """Write the messages as JSON lines; the file appears whole or not at all."""
        try:
            path = path.resolve()  # a link stays one
            if path.exists() and not path.is_file():
                raise OSError(0, "not a file")
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            try:
                lines = (f"{json.dumps(_plain(message))}\n" for message in self.messages)
                partial.write_text("".join(lines), encoding="utf-8")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            _complain(f"{path}: cannot be written: {getattr(error, 'strerror', error)}")


def _plain(message: "dict[str, str] | Message") -> dict[str, str]:
    """Return a message as JSON can hold it, without what it has not."""
    if isinstance(message, dict):
        return message
    fields = {"role": message.role, "channel": message.channel, "recipient": message.recipient}
    return {name: value for name, value in fields.items() if value} | {"content": message.text}


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[Event]:
    """Note Ctrl-C instead of raising: an exception amid a step would leave the cache half written."""
    noted = Event()
    previous = signal.signal(signal.SIGINT, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)


def _complain(error: object) -> None:
    click.echo(f"Error: {one_line(str(error))}", err=True)


def _read_line(typed: bool) -> str | None:
    """Return the next line, typed at a prompt or piped in; None after the last."""
    if typed:
        try:
            typed_line = input("> ")
            typed_line.encode()  # raises what `chat` tells of a line that is not UTF-8
            return typed_line
        except EOFError:
            click.echo()
            return None
    line = sys.stdin.buffer.readline() if sys.stdin else b""
    return decode(line, "the line").rstrip("\r\n") if line else None


@click.command()
@model_options
@chat_options
@sampling_options
def chat(load_model: Loader, turn: "GenerateOptions", choice: "GenerateOptions") -> None:
    """Talk with the model, line by line.

    /help lists what else can be typed.
    A terminal shows the reasoning, dimmed, before each answer; a pipe or a file gets the answers alone.
    """
    session = Session(load_model(), {**turn, **choice})
    typed = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # gives input() line editing and a history
        click.echo("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = _read_line(typed)
            if line is None or (line.startswith("/") and not session.command(line)):
                return
            if line.strip() and not line.startswith("/"):
                session.answer(line)
        except KeyboardInterrupt:
            if not typed:
                raise
            click.echo("\nLeave with /exit or Ctrl-D.")
        except UnicodeError:
            _complain("the line is not UTF-8")
        except GptOssError as error:
            _complain(f"{error} (/reset forgets the conversation)" if session.messages else error)
