"""`gptoss-lite generate`: one prompt, one answer."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from gptoss_lite.cli.options import chat_options, check_text, decode, model_options, sampling_options
from gptoss_lite.cli.printing import Printer
from gptoss_lite.cli.progress import Loader, stream
from gptoss_lite.cli.timing import Stopwatch
from gptoss_lite.errors import RequestError

if TYPE_CHECKING:
    from gptoss_lite.generation import GenerateOptions
    from gptoss_lite.stream import GenerationEvent


def _read_prompt(argument: str | None) -> str:
    """Return the argument; or standard input, less a line feed at its end, where that is None or `-`."""
    if argument not in (None, "-"):
        prompt = argument
    elif sys.stdin is None:
        prompt = ""
    else:
        if sys.stdin.isatty():
            click.echo("Type the prompt, and end it with Ctrl-D on a line of its own.", err=True)
        prompt = decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    if not prompt:
        raise RequestError("the prompt is empty: give it as an argument or on standard input")
    return prompt


def _json_line(event: "GenerationEvent") -> str:
    line = dataclasses.asdict(event)
    del line["usage"], line["messages"]
    return json.dumps(line)


@click.command()
@click.argument("prompt", required=False, callback=check_text)
@model_options
@chat_options
@sampling_options
@click.option("--raw", is_flag=True, help="Go on from the prompt as plain text, without a chat.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: events, then usage.")
@click.option("--logprobs", type=click.IntRange(0, 20), help="With --json: also of the N best tokens.")
@click.option("--verbose", is_flag=True, help="Tell device, times, rates, memory and seed on standard error.")
def generate(
    prompt: str | None,
    load_model: Loader,
    turn: "GenerateOptions",
    choice: "GenerateOptions",
    raw: bool,
    as_json: bool,
    logprobs: int | None,
    verbose: bool,
) -> None:
    """Answer one prompt.

    Without PROMPT, or where it is `-`, the prompt is read from standard input.
    A terminal shows the reasoning, dimmed, and then the answer; a pipe or a file gets the answer alone.
    """
    if raw and turn:
        raise click.UsageError("--raw is no chat: it takes no --reasoning, --instructions or --date")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are printed by --json: give both")
    sampling = dataclasses.replace(choice["sampling"], logprobs=logprobs)
    options: GenerateOptions = {**turn, **choice, "sampling": sampling}
    text = _read_prompt(prompt)
    messages = [{"role": "user", "content": text}]

    stopwatch, printer = Stopwatch(), Printer()
    loaded = load_model()
    events = stream(loaded, text if raw else None, messages=None if raw else messages, **options)
    for event in stopwatch.watch(events):
        if as_json:
            click.echo(_json_line(event))
        else:
            printer.show(event)
    assert event.usage is not None  # the last event has it
    if as_json:
        click.echo(json.dumps({"usage": dataclasses.asdict(event.usage)}))
    else:
        printer.finish()
    if verbose:
        click.echo(stopwatch.report(loaded[0], event.usage), err=True)
