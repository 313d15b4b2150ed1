"""`gptoss-lite quantize`: a checkpoint in fewer bits, and what that cost."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import click

from gptoss_lite import __version__
from gptoss_lite.cli.conversion import conversion_options, echo, open_source, plan_document, run, show_plan
from gptoss_lite.errors import FormatError

CHOICES = click.Choice(["mxfp4", "int8", "keep"])


def _read_group_size(_ctx: click.Context, _param: click.Parameter, value: str) -> int | None:
    if value == "row":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number of columns nor row")
    return int(value)


@click.command()
@conversion_options
@click.option(
    "--preset",
    type=click.Choice(["experts", "balanced", "small", "smallest"]),
    default="experts",
    show_default=True,
    help="Which weights, and how: see above.",
)
@click.option("--experts", type=CHOICES, help="Experts in another format than the preset's;")
@click.option("--attention", type=CHOICES, help="the same for attention,")
@click.option("--lm-head", type=CHOICES, help="for the output matrix,")
@click.option("--embedding", type=CHOICES, help="and for the embedding.")
@click.option(
    "--tensor",
    "tensors",
    multiple=True,
    metavar="PATTERN=FORMAT",
    help="The same for weights by name: '*.o_proj.weight=int8:64'; repeatable.",
)
@click.option(
    "--group-size",
    metavar="N|row",
    default="32",
    show_default=True,
    callback=_read_group_size,
    help="Columns that share a scale of int8: a multiple of 32, or the whole row.",
)
@click.option(
    "--scales",
    type=click.Choice(["bf16", "float16", "e8m0"]),
    help="Of int8; bf16 by default, e8m0 for MXFP4.",
)
@click.option(
    "--mxfp4-scales",
    type=click.Choice(["search", "ocp"]),
    default="search",
    show_default=True,
    help="Exponents that leave the least error, or those of the specification's rule.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A text to run the model over first, so that errors are made where they matter least; takes hours.",
)
@click.option(
    "--calibrate-tokens",
    type=click.IntRange(min=512),
    help="Most tokens of that text to use; 16384 by default.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE", help="Write the cost as an HTML page."
)
def quantize(
    source: str, destination: Path, preset: str, experts: str | None, attention: str | None,
    lm_head: str | None, embedding: str | None, tensors: tuple[str, ...], group_size: int | None,
    scales: Literal["bf16", "float16", "e8m0"] | None, mxfp4_scales: str, calibrate: Path | None,
    calibrate_tokens: int | None, report: Path | None, shard_size: int | None, workers: int | None,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a checkpoint with some of its weights quantised, and tell what it cost.

    \b
    experts   MXFP4 experts, all else as it was
    balanced  attention and lm_head in int8, too
    small     the embedding in int8, too
    smallest  as small, but attention in MXFP4

    What is quantised already stays as it is unless an option names it; MXFP4 becomes int8 exactly. Routers,
    norms, sinks and biases are never quantised.

    SOURCE is a directory in any layout or a GGUF file; or a name: demo, 20b, 120b, or org/name on the hub.
    DESTINATION gets Hugging Face's layout. An interrupted run goes on when the command is repeated.
    """
    from gptoss_lite.calibrate import MAX_TOKENS, read_rows
    from gptoss_lite.conversion import plan_quantization
    from gptoss_lite.conversion.cost import tensor_reports
    from gptoss_lite.conversion.files import SHARD_BYTES
    from gptoss_lite.quant.formats import MXFP4, Int8
    from gptoss_lite.quant.policy import make_policy
    from gptoss_lite.quant.report import Report, lines, to_json
    from gptoss_lite.quant.report_html import html
    from gptoss_lite.tokenizer import load_tokenizer

    given = {"experts": experts, "attention": attention, "lm_head": lm_head, "embedding": embedding}
    groups = {group: choice for group, choice in given.items() if choice is not None}
    if calibrate is None and calibrate_tokens is not None:
        raise click.UsageError("--calibrate-tokens are those of a text: give --calibrate, too")
    if report is not None and dry_run:
        raise click.UsageError("--report tells what it cost, which --dry-run cannot")
    try:
        policy = make_policy(preset, groups=groups, tensors=tensors, group_size=group_size, scales=scales)
    except FormatError as error:
        raise click.UsageError(str(error)) from None
    checkpoint = open_source(source)
    rows = None
    if calibrate is not None:
        tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
        rows = read_rows(calibrate, tokenizer, calibrate_tokens or MAX_TOKENS)
    plan = plan_quantization(
        checkpoint,
        destination,
        policy,
        search=mxfp4_scales == "search",
        calibration_rows=rows,
        shard_bytes=shard_size or SHARD_BYTES,
    )
    if all(not isinstance(w.form, MXFP4 | Int8) or w.form == w.before for w in plan.weights):
        click.echo("Note: nothing is to be quantised, for all of it has its format already.", err=True)
    if dry_run:
        echo(plan_document(plan), show_plan(plan), as_json)
        return
    with _page(report) as page:
        seconds = run(plan, workers)
        if seconds is None:
            if page is not None:
                raise click.ClickException("no report: what it cost is only known when it is written")
            if as_json:
                echo(plan_document(plan) | {"seconds": None, "report": None}, [], as_json)
            return
        rounding = f"mxfp4 scales by {mxfp4_scales}"
        if rows is not None:
            rounding = f"calibrated on {calibrate}, {sum(map(len, rows)):,} tokens"
        asked = (
            f"preset {preset}",
            *(f"{group} {choice}" for group, choice in groups.items()),
            *tensors,
            rounding,
        )
        made = Report(source, str(destination), asked, seconds, __version__, tensor_reports(plan))
        echo(
            plan_document(plan) | {"seconds": seconds, "report": to_json(made)},
            [f"Wrote {destination} in {seconds:.1f} s", "", *lines(made)],
            as_json,
        )
        if page is not None:
            page.write(html(made))


@contextmanager
def _page(path: Path | None) -> Iterator[TextIO | None]:
    """Open a page to be written later, so that it is known before a long run that it can be.

    It has another name until it is whole. Raises UsageError where it cannot be made.
    """
    if path is None:
        yield None
        return
    if path.exists():
        raise click.UsageError(f"--report {path} exists already: give another name, or remove it")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        page = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"--report {path} cannot be written: {error.strerror}") from None
    try:
        with page:
            yield page
        if partial.stat().st_size:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
