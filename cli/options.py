"""Options that several commands share, and the values they are read as."""

import functools
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeAlias, TypeVar

import click

import gptoss_lite as gl
from gptoss_lite.cli.progress import load
from gptoss_lite.errors import RequestError

Command: TypeAlias = Callable[..., None]
Given = TypeVar("Given", str | None, tuple[str, ...])

EFFORTS = ("low", "medium", "high")


def decode(data: bytes, source: str) -> str:
    """Decode UTF-8; raises RequestError naming the source and the position of the first wrong byte."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise RequestError(f"{source} is not UTF-8: {wrong}") from None


def check_text(_ctx: click.Context, _param: click.Parameter, value: Given) -> Given:
    """Refuse a text, or one of several, that was no UTF-8 when the shell handed it over; a click callback."""
    for text in (value,) if isinstance(value, str) else value or ():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise click.BadParameter(f"not UTF-8 at character {error.start}") from None
    return value


def _read_biases(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> dict[int, float]:
    """Read ID=VALUE, repeated, as a token's id and what is added to its logit."""
    biases = {}
    for item in value:
        token, _, bias = item.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{item!r} is not a token id, `=` and a number") from None
    return biases


def _check_device(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|emulated|reference", value):
        raise click.BadParameter(f"{value!r} is not one of auto, cpu, cuda, cuda:N, emulated, reference")
    return value


def read_size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Read a size such as 8GB as bytes; a click callback."""
    from gptoss_lite.sizes import parse_size

    try:
        return None if value is None else parse_size(value)
    except RequestError as error:
        raise click.BadParameter(str(error)) from None


def _bundle(
    argument: str, build: Callable[..., Any], **options: dict[str, Any]
) -> Callable[[Command], Command]:
    """Make a decorator that adds options, and hands what `build` makes of their values to one argument."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def bundled(**values: Any) -> None:
            own = {name: values.pop(name) for name in options}
            command(**values, **{argument: build(**own)})

        decorated: Command = bundled
        for name, settings in reversed(options.items()):
            decorated = click.option(f"--{name.replace('_', '-')}", **settings)(decorated)
        return decorated

    return decorate


def _turn(reasoning: str | None, instructions: str | None, date: datetime | None) -> dict[str, Any]:
    turn = {"reasoning_effort": reasoning, "instructions": instructions, "date": date and date.date()}
    return {name: value for name, value in turn.items() if value is not None}


def _choice(max_tokens: int | None, stop: tuple[str, ...], **sampling: Any) -> dict[str, Any]:
    if "" in stop:
        raise click.UsageError("--stop is empty: give a text")
    try:
        return {"max_tokens": max_tokens, "stop": stop, "sampling": gl.SamplingParams(**sampling)}
    except RequestError as error:
        raise click.UsageError(str(error)) from error


model_options = _bundle(
    "load_model",
    lambda **values: functools.partial(load, **values),
    model={
        "metavar": "PATH|NAME",
        "default": "demo",
        "help": "Checkpoint, or org/name, 20b or 120b from the hub; the bundled `demo` by default.",
    },
    device={
        "metavar": "auto|cpu|cuda[:N]|reference",
        "callback": _check_device,
        "default": "auto",
        "show_default": True,
        "help": "What computes: `auto` takes a GPU if there is one; `reference` is plain NumPy, slow.",
    },
    device_memory={
        "metavar": "SIZE",
        "callback": read_size,
        "help": "Most memory to take of a GPU, 8GB say; all that is free by default.",
    },
    cache_tokens={
        "type": click.IntRange(min=1),
        "help": "Tokens to keep keys and values of; one context by default.",
    },
    threads={"type": click.IntRange(min=1), "help": "CPU threads; one a core by default."},
    activations={
        "type": click.Choice(["accurate", "int8"]),
        "help": "On a CPU, what packed weights multiply: `int8` reads prompts faster, and is less accurate.",
    },
    dense={
        "type": click.Choice(["int8"]),
        "help": "On a CPU, quantise attention and output matrices while loading: answers come faster.",
    },
)
chat_options = _bundle(
    "turn",
    _turn,
    reasoning={"type": click.Choice(EFFORTS), "help": "How long to think first; medium by default."},
    instructions={"callback": check_text, "help": "What the developer message tells the model."},
    date={
        "type": click.DateTime(["%Y-%m-%d"]),
        "metavar": "YYYY-MM-DD",
        "help": "The date the model is told; today by default.",
    },
)
sampling_options = _bundle(
    "choice",
    _choice,
    max_tokens={"type": click.IntRange(min=1), "help": "Most tokens of an answer, its reasoning included."},
    stop={"multiple": True, "callback": check_text, "help": "Text that ends the answer; repeatable."},
    temperature={"type": float, "default": 1.0, "show_default": True, "help": "0 takes the best token."},
    top_p={"type": float, "default": 1.0, "show_default": True, "help": "Probability to choose from."},
    top_k={"type": int, "default": 0, "show_default": "all", "help": "How many tokens to choose from."},
    min_p={"type": float, "default": 0.0, "help": "Least probability, as a share of the best token's."},
    seed={"type": int, "help": "Fixes every draw; itself drawn by default."},
    repetition_penalty={"type": float, "default": 1.0, "help": "Above 1: against tokens seen before."},
    presence_penalty={"type": float, "default": 0.0, "help": "Off the logit of a token answered before."},
    frequency_penalty={"type": float, "default": 0.0, "help": "The same, for each time it was."},
    logit_bias={
        "multiple": True,
        "metavar": "ID=VALUE",
        "callback": _read_biases,
        "help": "Added to a token's logit; repeatable.",
    },
)
