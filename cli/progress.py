"""Loading a model and reading a prompt, with a progress bar where there is someone to see it."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from threading import Event, Timer
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import click

import gptoss_lite as gl

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from gptoss_lite.memory import Plan
    from gptoss_lite.model import GptOss
    from gptoss_lite.stream import GenerationEvent
    from gptoss_lite.tokenizer import Tokenizer

Loaded: TypeAlias = "tuple[GptOss, Tokenizer]"
Loader: TypeAlias = Callable[[], "Loaded"]

PATIENCE = 1.0  # seconds before a bar is worth drawing


class _Stopped(Exception):
    """Ends a stream that has not come to its first token."""


class Bar:
    """A progress bar on standard error that appears once the work has taken a second, and then goes away."""

    def __init__(self, label: str, *, bytes_counted: bool = False) -> None:
        self._label = label
        self._bytes_counted = bytes_counted
        self._state = 0, 1  # done, total
        self._bar: Progress | None = None
        self._timer = Timer(PATIENCE, self._appear)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if sys.stderr and sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, done: int, total: int) -> None:
        """Show how much is done of how much there is."""
        self._state = done, total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def close(self) -> None:
        """Take the bar away; it does not come back."""
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _appear(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        if self._bytes_counted:
            columns += [DownloadColumn(binary_units=True), TimeRemainingColumn()]
        else:
            columns.append(MofNCompleteColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        done, total = self._state
        bar.add_task(self._label, completed=done, total=total)
        bar.start()
        self._bar = bar


def fetch(model: str) -> "Path":
    """Find a model by its path or name as `gptoss_lite.hub.resolve` does, showing how far a download is."""
    from gptoss_lite.hub import resolve

    with Bar(f"Downloading {model}", bytes_counted=True) as bar:
        return resolve(model, bar.advance)


def load(model: str, device: str, **options: Any) -> "Loaded":
    """Load a model and its tokenizer as `gptoss_lite.load` does, showing what goes where and how far it is.

    What goes where on a GPU is told to a terminal, and to anyone where not all of it fits there.
    """

    def tell(plan: "Plan") -> None:
        from gptoss_lite.memory import lines

        if plan.host_layers or (sys.stderr is not None and sys.stderr.isatty()):
            click.echo("\n".join(lines(plan)), err=True)

    path = fetch(model)
    with Bar(f"Loading {model}", bytes_counted=True) as bar:
        return gl.load(path, device, **options, progress=bar.advance, planned=tell)


def stream(
    loaded: "Loaded", prompt: str | None = None, *, interrupted: Event | None = None, **options: Any
) -> "Generator[GenerationEvent, None, None]":
    """Generate as `gptoss_lite.stream_generate` does, showing how much of the prompt is read until then.

    Ends between two steps once `interrupted` is set. The first of all runs compiles the kernels meanwhile.
    """

    def stopped() -> bool:
        return interrupted is not None and interrupted.is_set()

    def advance(done: int, total: int) -> None:
        bar.advance(done, total)
        if stopped():
            raise _Stopped

    events = gl.stream_generate(*loaded, prompt, prompt_progress=advance, **options)
    with Bar("Reading the prompt") as bar, suppress(_Stopped), closing(events):
        for event in events:
            bar.close()
            yield event
            if stopped():
                return
