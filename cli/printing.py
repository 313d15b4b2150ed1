"""What a terminal or a pipe gets to see of an answer while it streams."""

import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gptoss_lite.stream import GenerationEvent

# A model can be talked into writing escape sequences, which steer a terminal: controls get stand-ins.
_VISIBLE: dict[int, int | None] = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_VISIBLE |= {ord("\r"): None, 0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

LONGEST_LINE = 600  # of an error, in characters


def printable(text: str) -> str:
    """Return text that a terminal only shows: each control character but tab and line feed has a stand-in."""
    return text.translate(_VISIBLE)


def one_line(text: str) -> str:
    """Return an error's text as one line that only shows: names in it may come from a stranger's file."""
    line = printable(text.replace("\n", "\u2424"))
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


class Printer:
    """Prints events as they come: the answer, and on a terminal the reasoning before it, dimmed.

    Every piece is styled and reset by itself, so that a terminal is left clean wherever the stream is cut.
    """

    def __init__(self) -> None:
        self._terminal = bool(sys.stdout and sys.stdout.isatty())
        self._dim = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._answered = False  # whether any of the answer itself has come
        self._part: tuple[str | None, str | None] | None = None  # channel and recipient of the last text
        self._last = "\n"  # the last character written
        self._finish_reason: str | None = None

    def show(self, event: "GenerationEvent") -> None:
        """Write one event's text, if it is for these eyes, and flush it."""
        answering = event.is_content
        self._finish_reason = event.finish_reason
        if not event.text or not (answering or self._terminal):
            return
        self._answered |= answering
        part = event.channel, event.recipient
        if self._part not in (None, part):
            click.echo("\n")
        text = printable(event.text) if self._terminal else event.text
        click.echo(text if answering or not self._dim else click.style(text, dim=True), nl=False)
        self._part, self._last = part, event.text[-1]

    def finish(self) -> None:
        """End the last line, if it has begun; say so if the tokens were used up before the answer."""
        if self._last != "\n":
            click.echo()
        if self._finish_reason == "length" and not self._answered:
            click.echo("Note: the token limit was reached before the answer.", err=True)
