"""The gptoss-lite command group: which commands there are, and what leaves them as an exit code."""

import importlib
import io
import os
import sys
from typing import Any

import click

from gptoss_lite import __version__
from gptoss_lite.cli.printing import one_line
from gptoss_lite.errors import GptOssError

COMMANDS = {
    "bench": "gptoss_lite.cli.bench:bench",
    "chat": "gptoss_lite.cli.chat:chat",
    "convert": "gptoss_lite.cli.convert:convert",
    "generate": "gptoss_lite.cli.generate:generate",
    "inspect": "gptoss_lite.cli.inspect:inspect",
    "quantize": "gptoss_lite.cli.quantize:quantize",
    "serve": "gptoss_lite.cli.serve:serve",
}
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
CLOSED_PIPE = 141  # 128 + SIGPIPE

EXIT_CODES = f"""\b
Exit codes:
  0    done
  1    an error, told in one line
  2    a wrong option or argument
  {INTERRUPTED}  stopped by Ctrl-C
  {CLOSED_PIPE}  standard output was closed early, as by `| head`"""


class LazyGroup(click.Group):
    """Imports a command when it is named, which is click's documented recipe; the one way out for errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of --help."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a user or the machine caused becomes one line, the rest stays a traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _discard_output()
            raise click.exceptions.Exit(CLOSED_PIPE) from None
        except (GptOssError, MemoryError) as error:
            raise click.ClickException(one_line(str(error) or "out of memory")) from error
        except OSError as error:
            _discard_output()
            what = error.strerror or str(error)
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(one_line(f"{where}{what}")) from error


def _discard_output() -> None:
    """Let standard output go nowhere if it takes no more: the interpreter would complain of it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=LazyGroup, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gptoss-lite")
def main() -> None:
    """Run OpenAI's gpt-oss models from packed weights."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer holds what not every locale can show
