"""`gptoss-lite inspect`: what a checkpoint holds, and what it needs."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import click

from gptoss_lite.cli.options import read_size
from gptoss_lite.cli.progress import Bar, fetch
from gptoss_lite.errors import OutOfMemoryError
from gptoss_lite.tables import aligned

if TYPE_CHECKING:
    from gptoss_lite.checkpoint import Checkpoint
    from gptoss_lite.memory import Plan


@click.command()
@click.argument("path", metavar="PATH|NAME")
@click.option("--device-memory", metavar="SIZE", callback=read_size, help="Plan for a GPU of 16GB, say.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens to plan for; all by default.")
@click.option("--tensors", is_flag=True, help="List every tensor, too.")
@click.option("--checksums", is_flag=True, help="Read everything, and check values and checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(
    path: str, device_memory: int | None, context: int | None, tensors: bool, checksums: bool, as_json: bool
) -> None:
    """Show what a checkpoint holds: layout, network, formats, bytes, and the memory it takes.

    PATH is a directory or a GGUF file; or the name of a model: demo, 20b, 120b, or org/name on the hub. Only
    headers are read, unless --checksums is given.
    """
    from gptoss_lite.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(fetch(path))
    checked = _check(checkpoint) if checksums else None
    plan, problem = _plan(checkpoint, device_memory, context)
    if as_json:
        click.echo(json.dumps(_document(checkpoint, plan, problem, checked, tensors), indent=2))
        return
    for line in _lines(checkpoint, tensors):
        click.echo(line)
    if checked is not None:
        click.echo(f"\nAll {checked[0]} tensors are sound; {checked[1]} have a checksum, which is right.")
    click.echo()
    if plan is None:
        raise OutOfMemoryError(problem)
    from gptoss_lite.memory import lines

    click.echo("\n".join(["On a GPU:" if device_memory is None else "On that GPU:", *lines(plan)]))


def _plan(
    checkpoint: "Checkpoint", device_memory: int | None, context: int | None
) -> "tuple[Plan | None, str]":
    from gptoss_lite.memory import make_plan
    from gptoss_lite.ops.cuda import CUDAOps

    try:
        return make_plan(
            checkpoint.config, checkpoint.forms(), device_bytes=device_memory, cache_tokens=context,
            step_tokens=CUDAOps.step_tokens,
        ), ""  # fmt: skip
    except OutOfMemoryError as error:
        return None, str(error)


def _check(checkpoint: "Checkpoint") -> tuple[int, int]:
    """Verify every tensor -> how many there are, and how many have a checksum."""
    done, with_checksum = 0, 0
    with Bar(f"Checking {checkpoint.path}", bytes_counted=True) as bar:

        def note(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar.advance(min(done, checkpoint.nbytes), checkpoint.nbytes)  # tied weights are read twice

        for weight in checkpoint.weights.values():
            weight.verify(os.cpu_count() or 1, note)
            with_checksum += all(stored.checksum is not None for stored in weight.stored)
    return len(checkpoint.weights), with_checksum


def _lines(checkpoint: "Checkpoint", tensors: bool) -> list[str]:
    from gptoss_lite.inspection import groups, label
    from gptoss_lite.sizes import format_bytes

    config = checkpoint.config
    experts = f"{config.num_local_experts} experts, {config.num_experts_per_tok} of them for each token"
    heads = f"{config.num_attention_heads} query heads on {config.num_key_value_heads} of {config.head_dim}"
    files = sorted({stored.file for weight in checkpoint.weights.values() for stored in weight.stored})
    facts = {
        "path": str(checkpoint.path),
        "layout": checkpoint.layout,
        "files": f"{len(files)}, {format_bytes(sum(file.stat().st_size for file in files))}",
        "network": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {experts}",
        "attention": f"{heads}, windows of {config.sliding_window}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,}",
    }
    rows = [["group", "tensors", "parameters", "format", "bytes"]]
    found = groups(checkpoint)
    for group in found:
        counts = [f"{group.tensors:,}", f"{group.parameters:,}"]
        rows.append([group.name, *counts, ", ".join(group.forms), format_bytes(group.nbytes)])
    totals = [f"{sum(g.tensors for g in found):,}", f"{sum(g.parameters for g in found):,}"]
    rows.append(["in all", *totals, "", format_bytes(sum(g.nbytes for g in found))])
    lines = [*(f"{key + ':':12}{value}" for key, value in facts.items()), "", *aligned(rows, right=(1, 2, 4))]
    if tensors:
        each = [
            [name, label(form), "x".join(map(str, checkpoint.weights[name].shape)), format_bytes(form.nbytes)]
            for name, form in checkpoint.forms().items()
        ]
        lines += ["", *aligned([["tensor", "format", "shape", "bytes"], *each], right=(3,))]
    return lines


def _document(
    checkpoint: "Checkpoint",
    plan: "Plan | None",
    problem: str,
    checked: tuple[int, int] | None,
    tensors: bool,
) -> dict[str, Any]:
    from gptoss_lite.inspection import groups, label

    document: dict[str, Any] = {
        "path": str(checkpoint.path),
        "layout": checkpoint.layout,
        "config": dataclasses.asdict(checkpoint.config),
        "groups": [dataclasses.asdict(group) for group in groups(checkpoint)],
        "nbytes": checkpoint.nbytes,
    }
    if plan is None:
        document["plan"] = {"fits": False, "error": problem}
    else:
        document["plan"] = {"fits": True, **dataclasses.asdict(plan), "device_bytes": plan.device_bytes}
    if checked is not None:
        document["checked"] = {"tensors": checked[0], "with_checksum": checked[1]}
    if tensors:
        document["tensors"] = {
            name: {"format": label(form), "shape": checkpoint.weights[name].shape, "nbytes": form.nbytes}
            for name, form in checkpoint.forms().items()
        }
    return document
