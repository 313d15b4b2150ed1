"""`gptoss-lite serve`: the hosted API on this machine."""

import datetime
from pathlib import Path

import click

from gptoss_lite.cli.options import check_text, decode, model_options, read_size
from gptoss_lite.cli.progress import Loader
from gptoss_lite.errors import GptOssError, RequestError
from gptoss_lite.serve.settings import LOOPBACK, Settings


def _keys(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Return the keys given, and those in a file, one a line; RequestError for a file without any."""
    lines = [] if file is None else decode(file.read_bytes(), str(file)).splitlines()
    keys = [*given, *(line.strip() for line in lines if line.strip() and not line.startswith("#"))]
    if file is not None and len(keys) == len(given):
        raise RequestError(f"{file} has no key: write one a line")
    return tuple(keys)


def _hosts(host: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that the server answers to: on a loopback address its own alone, else all."""
    return (*LOOPBACK, *allowed) if host in LOOPBACK else allowed


@click.command()
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option("--name", callback=check_text, help="What clients call the model; by default as --model does.")
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    envvar="GPTOSS_LITE_API_KEY",
    show_envvar=True,
    help="Key that clients must send; repeatable.",
)
@click.option(
    "--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Keys, one a line."
)
@click.option(
    "--max-sequences", type=click.IntRange(1, 1024), default=16, show_default=True, help="Answers at once."
)
@click.option(
    "--max-waiting", type=click.IntRange(0), default=256, show_default=True, help="Answers that may wait."
)
@click.option("--max-body", callback=read_size, default="8MB", show_default=True, help="Largest request.")
@click.option(
    "--max-seconds", type=click.IntRange(min=1), help="Longest time for an answer, which then ends."
)
@click.option(
    "--drain-seconds",
    type=click.IntRange(0, 3600),
    default=30,
    show_default=True,
    help="Time for answers under way once the server is told to stop.",
)
@click.option("--cors-origin", "origins", multiple=True, help="Origin whose pages may call; repeatable.")
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    help="Name the server is reached by besides localhost; repeatable.",
)
@click.option("--reasoning-content", is_flag=True, help="Repeat `reasoning` as `reasoning_content`.")
@click.option(
    "--date",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="YYYY-MM-DD",
    help="The date the model is told; today's by default.",
)
@click.option("--quiet", is_flag=True, help="Write no access log.")
@click.pass_context
def serve(
    ctx: click.Context,
    load_model: Loader,
    host: str,
    port: int,
    name: str | None,
    keys: tuple[str, ...],
    api_key_file: Path | None,
    max_sequences: int,
    max_waiting: int,
    max_body: int,
    max_seconds: int | None,
    drain_seconds: int,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    reasoning_content: bool,
    date: datetime.datetime | None,
    quiet: bool,
) -> None:
    """Serve the model to OpenAI clients: chat completions, responses, completions, and a page to chat on.

    An answer's log line has no word of what was said. SIGTERM lets answers under way end first.
    """
    try:
        from gptoss_lite.serve.app import create_app
        from gptoss_lite.serve.run import bind, log_to_stderr, run, warm_up
    except ImportError as error:
        package = (error.name or "its packages").partition(".")[0]
        raise GptOssError(f"serve needs {package}: pip install 'gptoss-lite[serve]'") from error
    from gptoss_lite.engine import Engine

    settings = Settings(
        model=name or ctx.params["model"],
        api_keys=_keys(keys, api_key_file),
        max_waiting=max_waiting,
        max_body=max_body,
        max_seconds=max_seconds,
        cors_origins=origins,
        allowed_hosts=_hosts(host, hosts),
        reasoning_content=reasoning_content,
        date=None if date is None else f"{date:%Y-%m-%d}",
    )
    listener = bind(host, port)
    model, tokenizer = load_model()
    engine = Engine(model, max_sequences=max_sequences)
    warm_up(engine)
    app = create_app(engine, tokenizer, settings)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]

    def announce() -> None:
        click.echo(f"Serving {settings.model} on http://{shown}:{address[1]}", err=True)
        if host not in LOOPBACK and not settings.api_keys:
            click.echo(
                "Note: anybody who can reach this machine may ask: --api-key asks for a key.", err=True
            )

    log_to_stderr(access=not quiet)
    run(app, listener, drain_seconds, announce)
