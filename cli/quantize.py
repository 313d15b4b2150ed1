"""`gptoss-lite quantize`: a checkpoint in fewer bits, and what that cost."""

from pathlib import Path
from typing import Literal

import click

from gptoss_lite import __version__
from gptoss_lite.cli.conversion import conversion_options, echo, open_source, plan_document, run, show_plan

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
    metavar="32|64|96|row",
    default="32",
    show_default=True,
    callback=_read_group_size,
    help="Columns that share a scale of int8.",
)
@click.option("--scales", type=click.Choice(["bf16", "float16", "e8m0"]), help="Of int8; bf16 by default.")
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
    type=click.IntRange(min=1),
    default=16384,
    show_default=True,
    help="Most tokens of that text to use.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE", help="Write the cost as an HTML page."
)
def quantize(
    source: str, destination: Path, preset: str, experts: str | None, attention: str | None,
    lm_head: str | None, embedding: str | None, tensors: tuple[str, ...], group_size: int | None,
    scales: Literal["bf16", "float16", "e8m0"] | None, mxfp4_scales: str, calibrate: Path | None,
    calibrate_tokens: int, report: Path | None, shard_size: int | None, workers: int | None, dry_run: bool,
    as_json: bool,
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
    from gptoss_lite.calibrate import read_rows
    from gptoss_lite.conversion import plan_quantization
    from gptoss_lite.conversion.cost import tensor_reports
    from gptoss_lite.conversion.files import SHARD_BYTES
    from gptoss_lite.quant.policy import make_policy
    from gptoss_lite.quant.report import Report, lines, to_json
    from gptoss_lite.tokenizer import load_tokenizer

    if report is not None and not report.parent.is_dir():
        raise click.UsageError(f"--report {report}: {report.parent} is not a directory")
    given = {"experts": experts, "attention": attention, "lm_head": lm_head, "embedding": embedding}
    groups = {group: choice for group, choice in given.items() if choice is not None}
    policy = make_policy(preset, groups=groups, tensors=tensors, group_size=group_size, scales=scales)
    checkpoint = open_source(source)
    rows = None
    if calibrate is not None:
        tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
        rows = read_rows(calibrate, tokenizer, calibrate_tokens)
    plan = plan_quantization(
        checkpoint,
        destination,
        policy,
        search=mxfp4_scales == "search",
        calibration_rows=rows,
        shard_bytes=shard_size or SHARD_BYTES,
    )
    if dry_run:
        echo(plan_document(plan), show_plan(plan), as_json)
        return
    seconds = run(plan, workers)
    if seconds is None:
        if report is not None or as_json:
            raise click.ClickException(
                f"no report: what quantising cost is known when {destination} is written"
            )
        return
    asked = (
        f"preset {preset}",
        *(f"{group} {choice}" for group, choice in groups.items()),
        *tensors,
        plan.method,
    )
    made = Report(source, str(destination), asked, seconds, __version__, tensor_reports(plan))
    if report is not None:
        from gptoss_lite.quant.report_html import html

        report.write_text(html(made), encoding="utf-8")
    echo(
        plan_document(plan) | {"seconds": seconds, "report": to_json(made)},
        [f"Wrote {destination} in {seconds:.1f} s", "", *lines(made)],
        as_json,
    )
