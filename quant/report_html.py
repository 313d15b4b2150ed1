"""What quantising cost as a page of HTML: one file that asks for nothing else and runs nothing."""

from collections.abc import Iterable, Sequence
from html import escape

from gptoss_lite.quant.report import (
    Report,
    TensorReport,
    Total,
    by_kind,
    write_bits,
    write_error,
    write_number,
    write_share,
)
from gptoss_lite.quant.report_svg import STYLES, Pair, Series, bars, by_layer, marker
from gptoss_lite.sizes import format_bytes

_WORST = 20
_PLOTTED = ("attention", "experts")

# Series differ in shape as well as in colour; both sets of colours stand out from their background.
_STYLE = """
:root { color-scheme: light dark;
  --page: #fff; --text: #1d2126; --soft: #5a636e; --line: #dde1e6; --tint: #f5f6f8;
  --before: #aab2bc; --after: #2463b8; 
  --s0: #2463b8; --s1: #c2500a; --s2: #0b7a55; --s3: #8438ad; --s4: #916a00; --s5: #b8256d; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15181c; --text: #e4e7eb; --soft: #9aa4af; --line: #2f353c; --tint: #1d2126;
  --before: #5d6772; --after: #6ea8ff; 
  --s0: #6ea8ff; --s1: #ff9b57; --s2: #4fd1a0; --s3: #cf8ef4; --s4: #e0b94a; --s5: #ff86b9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .5rem; font-size: 1.15rem; }
h3 { margin: 1.25rem 0 .25rem; font-size: 1rem; }
p { margin: .4rem 0; max-width: 46rem; }
.lead { margin: .6rem 0 1.4rem; font-size: 1.1rem; }
.note { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 600; border-bottom-color: var(--soft); vertical-align: bottom;
  white-space: normal; }
tbody th { font-weight: 400; }
tfoot th, tfoot td { border-bottom: 0; font-weight: 600; }
.number { text-align: right; }
.quiet { color: var(--soft); }
code { font: .87em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
figure { margin: .25rem 0 1rem; }
.plot { display: block; width: 100%; min-width: 42rem; }
.plot text { font-size: 12.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.plot .name { fill: var(--text); }
.rule { stroke: var(--line); }
.line { fill: none; stroke: currentColor; stroke-width: 1.5; opacity: .7; }
.point { fill: currentColor; stroke: transparent; stroke-width: 10; pointer-events: all; }
.before { fill: var(--before); color: var(--before); }
.after { fill: var(--after); color: var(--after); }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: .3rem 0 .6rem; padding: 0;
  list-style: none; font-size: .9rem; }
.key { width: 14px; height: 14px; vertical-align: -2px; margin-right: .3rem; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: .4rem;
  vertical-align: -1px; background: currentColor; }
.legend span { color: var(--text); }
summary { cursor: pointer; padding: .3rem 0; }
"""


def html(report: Report) -> str:
    """Write a whole page; whatever text the report holds, from wherever, is shown as text."""
    title = f"What quantising {report.source} cost"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _lead(report),
        _facts(report),
        *_section("By group", _groups(report)),
        *_section("Error by layer", _layers(report)),
        *_section("What calibration bought", _calibration(report)),
        *_section("Bytes by group", _bytes(report)),
        *_section("Largest errors", _worst(report)),
        *_section("All tensors", _all(report)),
    ]
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _section(heading: str, parts: Sequence[str]) -> list[str]:
    return [f"<section><h2>{heading}</h2>", *parts, "</section>"] if parts else []


def _lead(report: Report) -> str:
    total = report.total
    if not report.tensors:
        return '<p class="lead">There were no tensors.</p>'
    sizes = f"{format_bytes(total.bytes_before)} became {format_bytes(total.bytes_after)}"
    if total.relative_error is None:
        return f'<p class="lead">{sizes}; every tensor was kept as it was.</p>'
    change = _change(total.bytes_before, total.bytes_after)
    bits = f", {write_bits(total.bits_after)} bits a weight" if total.bits_after is not None else ""
    error = (
        f"relative error {write_error(total.relative_error)}" if total.relative_error else "nothing was lost"
    )
    return f'<p class="lead"><strong>{sizes}</strong>{change}{bits}; {error}.</p>'


def _facts(report: Report) -> str:
    facts = [("from", report.source), ("to", report.destination)]
    facts += [("asked" if number == 0 else "", line) for number, line in enumerate(report.asked)]
    facts += [("took", _duration(report.seconds)), ("made by", f"gptoss-lite {report.version}")]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts) + "</dl>"


def _groups(report: Report) -> list[str]:
    def row(total: Total, formats: str) -> tuple[str, ...]:
        sizes = format_bytes(total.bytes_before), format_bytes(total.bytes_after)
        bits = write_bits(total.bits_before), write_bits(total.bits_after)
        counts = f"{total.tensors:,}", f"{total.kept:,}"
        return total.name, *counts, formats, *sizes, *bits, write_error(total.relative_error)

    head = (
        "group",
        "tensors",
        "kept",
        "format",
        "bytes before",
        "bytes after",
        "bits before",
        "bits after",
        "relative error",
    )
    rows = [row(total, _formats(total.before, total.after)) for total in report.groups()]
    note = (
        "The relative error is ‖source \N{MINUS SIGN} result‖ / ‖source‖ over all that changed its format; "
        "what was kept has none. Bits are for each weight, scales included."
    )
    table = _table("Totals by group", head, rows, right=(1, 2, 4, 5, 6, 7, 8), foot=row(report.total, ""))
    return [table, _note(note)]


def _layers(report: Report) -> list[str]:
    styles = _styles(report)
    parts = []
    for group in report.groups():
        members = [t for t in report.tensors if t.group == group.name and t.layer is not None]
        if all(tensor.is_kept for tensor in members):
            continue
        kinds = by_kind(members)
        kept = [kind for kind, tensors in kinds.items() if all(t.is_kept for t in tensors)]
        lossy = [kind for kind, tensors in kinds.items() if any(t.squared_error for t in tensors)]
        exact = [kind for kind in kinds if kind not in kept and kind not in lossy]
        series = [
            Series(
                kind, styles[kind], _points((t, 100 * t.relative_error) for t in kinds[kind] if not t.is_kept)
            )
            for kind in lossy
        ]
        parts.append(f"<h3>{_text(group.name)}</h3>")
        if series:
            parts += _figure("relative error, %", series)
        for what, names in (("Exact in every layer", exact), ("Kept as they were", kept)):
            if names:
                parts.append(_note(f"{what}: {', '.join(names)}."))
    return parts


def _calibration(report: Report) -> list[str]:
    if not (gains := report.gains()):
        return []
    note = (
        "With calibration, weights are rounded so that their outputs on a given text stay near to the "
        "source's; the values themselves may then err more. This compares both errors with what plain "
        "rounding would have left: the median over tensors of a kind, and for outputs the range."
    )
    head = ("kind", "tensors", "error of outputs", "from", "to", "error of values")
    rows = [
        (
            gain.kind,
            f"{gain.tensors:,}",
            *(_minus(write_share(share)) for share in (gain.outputs, gain.lowest, gain.highest)),
            "" if gain.values is None else _minus(write_share(gain.values)),
        )
        for gain in gains
    ]
    styles = _styles(report)
    parts = [_note(note), _table("What calibration bought", head, rows, right=(1, 2, 3, 4, 5))]
    for group in report.groups():
        members = [t for t in report.tensors if t.group == group.name and t.layer is not None]
        ratios = by_kind(tensor for tensor in members if tensor.output_ratio)
        series = [
            Series(kind, styles[kind], _points((t, 100 * (t.output_ratio or 0.0)) for t in tensors))
            for kind, tensors in ratios.items()
        ]
        if series:
            label = "error of outputs, % of that without calibration"
            parts += [f"<h3>{_text(group.name)}</h3>", *_figure(label, series)]
    return parts


def _bytes(report: Report) -> list[str]:
    pairs = []
    for total in report.groups():
        before, after = total.bytes_before, total.bytes_after
        notes = format_bytes(before), format_bytes(after) + _change(before, after)
        pairs.append(Pair(total.name, (before, after), notes))
    if not pairs:
        return []
    keys = "".join(
        f'<li><i class="swatch {kind}"></i><span>{kind}</span></li>' for kind in ("before", "after")
    )
    plot = bars("Bytes by group, before and after", pairs)
    return [f'<figure class="wide"><ul class="legend">{keys}</ul>{plot}</figure>']


def _worst(report: Report) -> list[str]:
    worst = report.worst(_WORST)
    return (
        [_tensors("Tensors of largest relative error", worst)]
        if worst
        else [_note("No tensor lost anything.")]
    )


def _all(report: Report) -> list[str]:
    if not report.tensors:
        return []
    summary = f"<summary>Show all {len(report.tensors):,}</summary>"
    return [f"<details>{summary}{_tensors('All tensors', report.tensors)}</details>"]


def _tensors(label: str, tensors: Iterable[TensorReport]) -> str:
    head = ("tensor", "format", "bytes before", "bytes after", "bits", "relative error", "largest error")
    rows = [
        (
            tensor.name,
            _formats((tensor.before,), (tensor.after,)),
            format_bytes(tensor.bytes_before),
            format_bytes(tensor.bytes_after),
            write_bits(8 * tensor.bytes_after / tensor.weights if tensor.weights else None),
            write_error(None if tensor.is_kept else tensor.relative_error),
            write_number(tensor.largest_error) if tensor.largest_error else "",
        )
        for tensor in tensors
    ]
    return _table(label, head, rows, right=(2, 3, 4, 5, 6), tag="code")


def _table(
    label: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[int],
    foot: Sequence[str] = (),
    tag: str = "",
) -> str:
    """Set up a table whose rows each begin with a header; tag: around that. right: columns of numbers."""

    def cells(row: Sequence[str]) -> str:
        made = []
        for number, text in enumerate(row):
            classes = " ".join(["number"] * (number in right) + ["quiet"] * (text == "kept"))
            attributes = f' class="{classes}"' if classes else ""
            if number:
                made.append(f"<td{attributes}>{_text(text)}</td>")
            else:
                name = f"<{tag}>{_text(text)}</{tag}>" if tag else _text(text)
                made.append(f'<th scope="row">{name}</th>')
        return f"<tr>{''.join(made)}</tr>\n"

    heads = "".join(
        f'<th scope="col"{" class=number" if number in right else ""}>{name}</th>'
        for number, name in enumerate(head)
    )
    body = "".join(cells(row) for row in rows)
    last = f"<tfoot>{cells(foot)}</tfoot>" if foot else ""
    return (
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>{last}</table></div>"
    )


def _figure(label: str, series: Sequence[Series]) -> list[str]:
    keys = "".join(f"<li>{marker(line.style)}{_text(line.name)}</li>" for line in series)
    plot = by_layer(label, series, lambda value: f"{write_number(value)} %" if value else "exact")
    return [f'<figure><ul class="legend">{keys}</ul><div class="wide">{plot}</div></figure>']


def _styles(report: Report) -> dict[str, int]:
    """Give each kind of tensor that was not kept in every layer a style, the same in all plots."""
    kinds = by_kind(t for t in report.tensors if t.layer is not None and not t.is_kept)
    return {kind: number % STYLES for number, kind in enumerate(kinds)}


def _points(values: Iterable[tuple[TensorReport, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((tensor.layer, value) for tensor, value in values if tensor.layer is not None)


def _formats(before: Sequence[str], after: Sequence[str]) -> str:
    one, other = ", ".join(before), ", ".join(after)
    return one if one == other else f"{one} → {other}"


def _change(before: int, after: int) -> str:
    return f" ({_minus(write_share(after / before))})" if before and before != after else ""


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _text(text: str) -> str:
    """Escape a text; bytes of a file's name that are no UTF-8 become question marks."""
    return escape(text.encode("utf-8", "replace").decode())
