"""`gptoss-lite convert`: a checkpoint in another layout, every value as it is."""

from pathlib import Path

import click

from gptoss_lite.cli.conversion import conversion_options, echo, open_source, plan_document, run, show_plan

TARGETS = ("hf", "bf16", "original", "gguf", "packed-cpu", "packed-cuda")


@click.command()
@conversion_options
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="The layout to write.")
def convert(
    source: str,
    destination: Path,
    target: str,
    shard_size: int | None,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint in another layout, and lose nothing.

    \b
    hf           Hugging Face's names, every weight in the format it has
    bf16         the same, all in bf16: for fine-tuning, or for others' tools
    original     OpenAI's own layout
    gguf         one file for llama.cpp; DESTINATION may end in .gguf
    packed-cpu   in the order that the CPU kernels read
    packed-cuda  in the order that the CUDA kernels read

    SOURCE is a directory in any layout or a GGUF file; or a name: demo, 20b, 120b, or org/name on the hub.
    What a layout cannot hold exactly is refused. An interrupted run goes on when the command is repeated.
    """
    from gptoss_lite.conversion import plan_conversion
    from gptoss_lite.conversion.files import SHARD_BYTES
    from gptoss_lite.sizes import format_bytes

    plan = plan_conversion(open_source(source), destination, target, shard_bytes=shard_size or SHARD_BYTES)
    if target == "gguf" and shard_size is not None:
        raise click.UsageError("--shard-size is for safetensors files: GGUF is one")
    if dry_run:
        echo(plan_document(plan), show_plan(plan), as_json)
        return
    seconds = run(plan, workers)
    if seconds is None:
        if as_json:
            echo(plan_document(plan) | {"seconds": None}, [], as_json)
    else:
        rate = f"{seconds:.1f} s ({plan.size / max(seconds, 1e-9) / 2**20:,.0f} MiB/s)"
        text = [f"Wrote {destination}: {format_bytes(plan.size)} in {rate}"]
        echo(plan_document(plan) | {"seconds": seconds}, text, as_json)
