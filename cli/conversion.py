"""What `quantize` and `convert` have in common: options, the plan in words, and the run."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from gptoss_lite.cli.options import read_size
from gptoss_lite.cli.printing import one_line
from gptoss_lite.cli.progress import Bar, fetch
from gptoss_lite.tables import aligned

if TYPE_CHECKING:
    from gptoss_lite.checkpoint import Checkpoint
    from gptoss_lite.conversion.plan import Plan

Command: TypeAlias = Callable[..., None]


def conversion_options(command: Command) -> Command:
    """Add what both commands take: source and destination first."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing."),
        click.option("--workers", type=click.IntRange(min=1), help="Threads; one a core by default."),
        click.option("--shard-size", metavar="SIZE", callback=read_size, help="Of a file; 5 GB by default."),
        click.argument("destination", type=click.Path(path_type=Path)),
        click.argument("source", metavar="SOURCE|NAME"),
    ):
        command = decorate(command)
    return command


def open_source(source: str) -> "Checkpoint":
    """Open what is to be converted, and tell what of it will be left out."""
    from gptoss_lite.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(fetch(source))
    if ignored := checkpoint.ignored:
        others = f" and {len(ignored) - 1} more" if ignored[1:] else ""
        click.echo(
            f"Note: left out, for the network does not ask for it: {one_line(ignored[0])}{others}.", err=True
        )
    return checkpoint


def show_plan(plan: "Plan") -> list[str]:
    """Tell what a conversion will write, by group: formats and bytes, before and after; and where it fits."""
    from gptoss_lite.cards import fits, summary
    from gptoss_lite.inspection import groups
    from gptoss_lite.sizes import format_bytes

    before, after = groups(plan.checkpoint), groups(plan.checkpoint, plan.stored_forms())
    rows = [["group", "tensors", "format", "", "", "bytes", "", ""]]
    for old, new in zip(before, after, strict=True):
        formats = [", ".join(old.forms), "->", ", ".join(new.forms)]
        sizes = [format_bytes(old.nbytes), "->", format_bytes(new.nbytes)]
        rows.append([old.name, f"{old.tensors:,}", *formats, *sizes])
    total = [format_bytes(sum(group.nbytes for group in side)) for side in (before, after)]
    rows.append(["in all", "", "", "", "", total[0], "->", total[1]])
    cards = [f"  {line}" for line in summary(fits(plan.checkpoint.config, plan.stored_forms()))]
    count = f"{len(plan.files)} file{'s' if len(plan.files) > 1 else ''} of weights"
    files = f"{count} and what goes along in {plan.destination}, {format_bytes(plan.size)} in all"
    return [*aligned(rows, right=(1, 5, 7)), "", files, "", "On GPUs:", *cards]


def plan_document(plan: "Plan") -> dict[str, Any]:
    """Tell the same for programs."""
    from gptoss_lite.cards import fits
    from gptoss_lite.inspection import groups

    forms = plan.stored_forms()
    return {
        "source": str(plan.checkpoint.path),
        "source_layout": plan.checkpoint.layout,
        "destination": str(plan.destination),
        "target": plan.target,
        "bytes": plan.size,
        "files": {file.name: file.size for file in plan.files},
        "before": [asdict(group) for group in groups(plan.checkpoint)],
        "after": [asdict(group) for group in groups(plan.checkpoint, forms)],
        "cards": [asdict(fit) for fit in fits(plan.checkpoint.config, forms)],
    }


def run(plan: "Plan", workers: int | None) -> float | None:
    """Carry a plan out, with a bar if there is someone to see it -> seconds; None if it was there already."""
    from gptoss_lite.conversion import execute

    start = time.monotonic()
    with Bar(f"Writing {plan.destination.name}", bytes_counted=True) as bar:
        try:
            written = execute(plan, workers=workers or _cores(), progress=bar.advance)
        except KeyboardInterrupt:
            bar.close()
            partial = f"{plan.destination}.partial"
            if os.path.exists(partial):
                click.echo(f"\nWhat is done is kept in {partial}: repeat the command to go on.", err=True)
            raise
    if not written:
        click.echo(f"{plan.destination} is there already, made of the same in the same way.", err=True)
        return None
    return time.monotonic() - start


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def echo(document: dict[str, Any], text: list[str], as_json: bool) -> None:
    """Print the result, for programs or for people."""
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(text))
