"""`gptoss-lite bench`: how fast a model is here, and how near that is to what the machine can do."""

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from gptoss_lite.cli.options import model_options
from gptoss_lite.cli.progress import Bar, fetch
from gptoss_lite.tables import aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_lite.benchmark import Figures, Report
    from gptoss_lite.checkpoint import Checkpoint

_NETWORKS = "20b", "120b", "demo"
_DECIDED = "model", "cache_tokens"  # of the options to load with, those that are not the user's here


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--synthetic", type=click.Choice(_NETWORKS), help="Random weights of this shape instead.")
@click.option("--layers", type=click.IntRange(min=1), help="Its first N, best an even N; all is estimated.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="To prefill."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="To decode, a sequence."
)
@click.option("--context", type=click.IntRange(min=1), help="Tokens before those; the prompt's by default.")
@click.option(
    "--concurrency", type=click.IntRange(1, 256), default=1, show_default=True, help="Sequences at once."
)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Times to measure it all."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights, prompts and draws."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with every measurement.")
def bench(
    model: str | None, synthetic: str | None, layers: int | None, prompt_tokens: int, tokens: int,
    context: int | None, concurrency: int, repeat: int, seed: int, as_json: bool, device: str, **options: Any,
) -> None:  # fmt: skip
    """Measure loading, prefill, decode and memory, beside how fast memory is read here.

    MODEL is a directory, a GGUF file or a name, as elsewhere; the bundled demo by default. --synthetic makes
    weights of random numbers, of the same shape and as many bytes as gpt-oss's own: nothing is downloaded.

    Prompts are random tokens. Times to first token are those of a prompt alone; a decode step gives each
    sequence a token. Where computing a context would take longer than a minute, random keys and values stand
    in its place, and the result says so.
    """
    from gptoss_lite.benchmark import run, to_json
    from gptoss_lite.measure import Workload

    if model is not None and synthetic is not None:
        raise click.UsageError(f"--synthetic {synthetic} is a model already: leave {model} out")
    if layers is not None and synthetic is None:
        raise click.UsageError("--layers are those of --synthetic: give both")
    workload = Workload(prompt_tokens, tokens, context, concurrency, repeat, seed)
    checkpoint = _open(model, synthetic, layers, seed)
    with ExitStack() as bars:
        loading = bars.enter_context(Bar(f"Loading {checkpoint.path}", bytes_counted=True))
        measuring = Bar(f"Measuring {checkpoint.path}")

        def measured(done: int, total: int) -> None:
            if done == 0:
                loading.close()
                bars.enter_context(measuring)
            measuring.advance(done, total)

        report = run(checkpoint, workload, device, progress=loading.advance, measured=measured, **options)
    click.echo(json.dumps(to_json(report), indent=2) if as_json else "\n".join(_lines(report)))


# What a model is loaded with elsewhere, but for what is decided here.
bench.params += [
    option
    for option in click.command("load")(model_options(lambda load_model: None)).params
    if option.name not in _DECIDED
]


def _open(model: str | None, synthetic: str | None, layers: int | None, seed: int) -> "Checkpoint":
    if synthetic is not None:
        from gptoss_lite import synthetic as random_weights

        return random_weights.synthetic(synthetic, layers=layers, seed=seed)
    from gptoss_lite.checkpoint import open_checkpoint

    return open_checkpoint(fetch(model or "demo"))


def _lines(report: "Report") -> list[str]:
    """Say what was measured on, and set out each median beside the repetitions that it is of."""
    from gptoss_lite.sizes import format_bytes

    device, load, memory, readings = report.device, report.load, report.memory, report.readings
    threads = None if device.threads is None else f"{device.threads} threads"
    how = [part for part in (device.name, threads, device.isa, device.arch) if part]
    slice_of = "" if report.estimate is None else f", {report.layers} of {report.whole_layers} layers"
    made = f", and {load.making_seconds:.1f} s to make them" if report.is_synthetic else ""
    mapped = ", pages of the mapped file included" if load.mapped_bytes else ""
    peak, free = (
        "unknown" if nbytes is None else format_bytes(nbytes) for nbytes in (memory.peak, memory.free)
    )
    facts = {
        "model": f"{report.model}{slice_of}",
        "device": ", ".join(how),
        "machine": f"{report.machine.processor}, {report.machine.cores} cores, {report.machine.system}",
        "load": f"{load.seconds:.1f} s for {format_bytes(load.weight_bytes)} of weights{made}",
        "warm-up": f"{report.warm_up_seconds:.1f} s",
        "memory": f"at most {peak}{mapped}; {free} were free before",
        "reading": f"{_rates(readings.rates, 1e9)} GB/s, a plain read of {format_bytes(readings.nbytes)}",
    }
    return [*(f"{name + ':':9}{fact}" for name, fact in facts.items()), "", *_table(report), *_notes(report)]


def _table(report: "Report") -> list[str]:
    workload, repetitions = report.workload, report.repetitions
    sequences = "" if workload.concurrency == 1 else f", {workload.concurrency} sequences in all"
    prefills, decodes = [one.prefill for one in repetitions], [one.decode for one in repetitions]
    labels = (
        f"prefill of {workload.prompt_tokens} tokens",
        "time to the first token",
        f"decode after {workload.start} tokens{sequences}",
        "read for a token",
        "share of the reading rate",
    )
    spans = (
        _rates([one.tokens_per_s for one in prefills]),
        _seconds([one.seconds for one in prefills]),
        _rates([one.tokens_per_s for one in decodes]),
        "",
        "",
    )
    columns = [labels, _column(report.figures), spans]
    heads = ["", "median", "repetitions"]
    if report.estimate is not None:
        columns.insert(2, _column(report.estimate))
        heads.insert(2, f"estimate for {report.whole_layers} layers")
    return aligned([heads, *zip(*columns, strict=True)], right=range(1, len(heads) - 1))


def _column(figures: "Figures") -> tuple[str, ...]:
    return (
        f"{_rate(figures.prefill_tokens_per_s)} tokens/s",
        f"{figures.first_token_seconds:.3f} s",
        f"{_rate(figures.decode_tokens_per_s)} tokens/s",
        f"{figures.bytes_per_token / 1e9:.3f} GB",
        f"{figures.read_share:.0%}",
    )


def _notes(report: "Report") -> list[str]:
    notes = []
    if report.estimate is not None:
        measured, whole = report.layers, report.whole_layers
        notes.append(
            f"Estimate: each of {whole} layers is taken to cost what these {measured} did on average; what is"
            " not in layers was measured without any."
        )
    if report.repetitions[0].decode.filled == "at random":
        notes.append("The context's keys and values were random numbers: computing it would have taken long.")
    return ["", *notes] if notes else []


def _rates(rates: "Sequence[float]", unit: float = 1.0) -> str:
    return " ".join(_rate(rate / unit) for rate in rates)


def _rate(rate: float) -> str:
    return f"{rate:,.1f}" if rate >= 10 else f"{rate:.3g}"


def _seconds(seconds: "Sequence[float]") -> str:
    return " ".join(f"{one:.3f}" for one in seconds)
