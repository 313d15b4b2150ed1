"""What each way to quantise costs the bundled model, over text that it has not seen: a table in Markdown.

The first half of that text calibrates, the second is measured, less its beginning. With --write, the table
goes between the markers of a page.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptoss_lite.calibrate import ROW_TOKENS
from gptoss_lite.checkpoint import Checkpoint, open_checkpoint
from gptoss_lite.conversion import execute, plan_quantization
from gptoss_lite.conversion.cost import tensor_reports
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.quality import Quality, compare
from gptoss_lite.quant.policy import Policy, make_policy
from gptoss_lite.quant.report import Total, write_error
from gptoss_lite.tokenizer import load_tokenizer

DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "demo"
BEGIN, END = (
    "<!-- made by python -m bench.quality: begin -->",
    "<!-- made by python -m bench.quality: end -->",
)
TUNED_ROWS = 14  # of the second half, by which calibration's constants were chosen: not measured
OCP, SEARCH, CALIBRATED = "OCP rule", "search", "calibrated"

Rows = list[list[int]]


class Case(NamedTuple):
    """One way to quantise."""

    weights: str
    method: str
    policy: Policy


@dataclass(frozen=True)
class Measured:
    """A case and what came of it. errors: squared, of each expert matrix; error: relative, of all of them."""

    weights: str
    method: str
    nbytes: int
    quality: Quality
    errors: tuple[float, ...] = ()
    error: float | None = None


def cases() -> Iterator[Case]:
    for method in (OCP, SEARCH, CALIBRATED):
        yield Case("`experts`: experts MXFP4", method, make_policy("experts"))
    for group, shown in ((32, "groups of 32"), (None, "rows")):
        yield Case(f"experts int8, {shown}", "", make_policy(groups={"experts": "int8"}, group_size=group))
    presets = {
        "balanced": "attention and output int8, too",
        "small": "the embedding int8, too",
        "smallest": "as `small`, attention MXFP4",
    }
    for preset, shown in presets.items():
        for method in (SEARCH, CALIBRATED):
            yield Case(f"`{preset}`: {shown}", method, make_policy(preset))


def halves() -> tuple[Rows, Rows]:
    """Cut the text in two at the end of a paragraph -> rows to calibrate with, rows to predict."""
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    middle = text.index("\n\n", len(text) // 2)
    tokenizer = load_tokenizer(DATA / "bf16", open_checkpoint(DATA / "bf16").config.vocab_size)
    first, second = tokenizer.encode(text[:middle]), tokenizer.encode(text[middle:])
    calibration = [first[start : start + ROW_TOKENS] for start in range(0, len(first), ROW_TOKENS)]
    # Each row's last token is only predicted, and is the first of the next.
    evaluation = [second[start : start + ROW_TOKENS + 1] for start in range(0, len(second) - 1, ROW_TOKENS)]
    return calibration, evaluation[TUNED_ROWS:]


def measure(source: Checkpoint, calibration: Rows, evaluation: Rows) -> Iterator[Measured]:
    reference = GptOss(source, get_ops("cpu"))
    yield Measured("bf16", "", source.nbytes, compare(reference, reference, evaluation))
    for case in cases():
        with tempfile.TemporaryDirectory() as directory:
            plan = plan_quantization(
                source, Path(directory) / "out", case.policy, search=case.method != OCP,
                calibration_rows=calibration if case.method == CALIBRATED else None,
            )  # fmt: skip
            execute(plan, workers=1)
            experts = [
                report for report in tensor_reports(plan) if report.group == "experts" and not report.is_kept
            ]
            made = open_checkpoint(plan.destination)
            quality = compare(reference, GptOss(made, get_ops("cpu")), evaluation)
            yield Measured(
                case.weights, case.method, made.nbytes, quality,
                tuple(report.squared_error for report in experts), Total.of("", experts).relative_error,
            )  # fmt: skip


def table(measured: Sequence[Measured]) -> list[str]:
    head = "size", "perplexity", "KL to bf16", "same best token", "same experts", "error of experts"
    lines = [
        f"| weights | MXFP4 by | {' | '.join(head)} |",
        f"|---|---|{'---:|' * len(head)}",
    ]
    for m in measured:
        q = m.quality
        figures = (
            f"{m.nbytes / 2**20:.2f} MiB", f"{q.perplexity:.3f}", f"{q.kl:.5f}", f"{100 * q.top1:.2f} %",
            f"{100 * q.routing:.2f} %", "" if m.error is None else write_error(m.error),
        )  # fmt: skip
        lines.append(f"| {m.weights} | {m.method} | {' | '.join(figures)} |")
    return lines


def findings(measured: Sequence[Measured]) -> list[str]:
    """Say in words what search and calibration bought."""
    ocp, search, calibrated = (
        next(m for m in measured if m.method == method) for method in (OCP, SEARCH, CALIBRATED)
    )
    ratios = np.divide(search.errors, ocp.errors)
    less = 100 * (1 - ratios)
    kl = [100 * (1 - calibrated.quality.kl / m.quality.kl) for m in (search, ocp)]
    return [
        f"In {(less > 0).sum()} of {len(less)} expert tensors the search leaves less squared error than the"
        f" rule, by {less.min():.1f} to {less.max():.1f} %. Calibration takes {kl[0]:.0f} % off the KL"
        f" divergence that the search leaves, and {kl[1]:.0f} % off the rule's."
    ]


def main() -> None:
    """Measure, print, and perhaps write."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the table between the markers of PAGE"
    )
    page: Path | None = parser.parse_args().write
    calibration, evaluation = halves()
    measured = list(measure(open_checkpoint(DATA / "bf16"), calibration, evaluation))
    counts = sum(map(len, calibration)), measured[0].quality.tokens
    about = (
        f"Calibrated over {counts[0]:,} tokens, measured over {counts[1]:,} others, in rows of {ROW_TOKENS}."
    )
    text = "\n".join([*table(measured), "", about, *findings(measured)])
    print(text)
    if page is not None:
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{page} has not both markers, {BEGIN} and {END}")
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
