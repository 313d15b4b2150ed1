"""What quantising cost, tensor by tensor: squared errors and bytes, as data, as JSON and as lines of text."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gptoss_lite.sizes import format_bytes
from gptoss_lite.tables import aligned

GROUPS = ("embedding", "attention", "experts", "lm_head", "norms and routers")

_SHOWN = 5  # tensors that `lines` names


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor before and after.

    name: canonical; layer: its number, None outside the layers; group: one of GROUPS. before, after: formats
    as people read them, "bf16" or "mxfp4". squared: sum of squared values of the source; squared_error: of
    source less result; largest_error: the largest magnitude of that. All zero where the tensor was kept.
    weights: how many values it has, 0 if not known.

    Where a calibration decided, squared_error_plain is what rounding by itself would have left, and of the
    outputs, e H e^T summed over rows for the inputs' Gram matrix H, weighted_error is what is left, and
    weighted_error_plain what would have been; else None.
    """

    name: str
    layer: int | None
    group: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    squared: float = 0.0
    squared_error: float = 0.0
    largest_error: float = 0.0
    weights: int = 0
    squared_error_plain: float | None = None
    weighted_error: float | None = None
    weighted_error_plain: float | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it has the format it had."""
        return self.before == self.after

    @property
    def relative_error(self) -> float:
        """||source - result|| / ||source||."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0

    @property
    def kind(self) -> str:
        """What it is within its layer: "q" for model.layers.0.self_attn.q_proj.weight, "lm_head"."""
        return self.name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")

    @property
    def output_ratio(self) -> float | None:
        """The error of outputs by that which rounding by itself would have left; None if not known."""
        return _ratio(self.weighted_error, self.weighted_error_plain)

    @property
    def value_ratio(self) -> float | None:
        """The same of the error of the weights themselves."""
        return _ratio(self.squared_error, self.squared_error_plain)


@dataclass(frozen=True, slots=True)
class Report:
    """One quantisation: of what, to where, as asked in which lines, in how many seconds, and at what cost.

    version: of this package.
    """

    source: str
    destination: str
    asked: tuple[str, ...]
    seconds: float
    version: str
    tensors: tuple[TensorReport, ...]

    @property
    def total(self) -> "Total":
        """All tensors together."""
        return Total.of("in all", self.tensors)

    def groups(self) -> list["Total"]:
        """Sum up by group those groups that there are, in the order of GROUPS."""
        members = {name: [tensor for tensor in self.tensors if tensor.group == name] for name in GROUPS}
        return [Total.of(name, tensors) for name, tensors in members.items() if tensors]

    def gains(self) -> list["Gain"]:
        """Tell what calibration bought, by kind of tensor in the order of the network; empty without one."""
        known = by_kind(tensor for tensor in self.tensors if tensor.output_ratio is not None)
        return [Gain.of(kind, tensors) for kind, tensors in known.items()]

    def worst(self, count: int) -> list[TensorReport]:
        """Pick so many tensors of largest relative error; those that lost nothing are not among them."""
        lossy = [tensor for tensor in self.tensors if tensor.squared_error]
        return sorted(lossy, key=lambda tensor: -tensor.relative_error)[:count]


@dataclass(frozen=True, slots=True)
class Total:
    """Some tensors together: how many, how many of them kept, their values, formats and bytes.

    before, after: formats, those of most bytes first. bits_before, bits_after: for each weight, scales
    included; None if not known. relative_error: of the tensors not kept together; None if all were.
    """

    name: str
    tensors: int
    kept: int
    weights: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    bits_before: float | None
    bits_after: float | None
    relative_error: float | None

    @classmethod
    def of(cls, name: str, tensors: Sequence[TensorReport]) -> "Total":
        """Sum tensors up."""
        kept = sum(tensor.is_kept for tensor in tensors)
        weights = sum(tensor.weights for tensor in tensors)
        is_counted = all(tensor.weights for tensor in tensors)
        before, after = Counter[str](), Counter[str]()
        for tensor in tensors:
            before[tensor.before] += tensor.bytes_before
            after[tensor.after] += tensor.bytes_after
        squared = math.fsum(tensor.squared for tensor in tensors)
        squared_error = math.fsum(tensor.squared_error for tensor in tensors)
        relative = math.sqrt(squared_error / squared) if squared else 0.0
        return cls(
            name=name,
            tensors=len(tensors),
            kept=kept,
            weights=weights,
            before=tuple(label for label, _ in before.most_common()),
            after=tuple(label for label, _ in after.most_common()),
            bytes_before=before.total(),
            bytes_after=after.total(),
            bits_before=8 * before.total() / weights if weights and is_counted else None,
            bits_after=8 * after.total() / weights if weights and is_counted else None,
            relative_error=None if kept == len(tensors) else relative,
        )


@dataclass(frozen=True, slots=True)
class Gain:
    """What calibration bought for tensors of one kind.

    outputs: the median of the tensors' output_ratio; lowest, highest: its range. values: the median of
    their value_ratio, which a calibration is free to let grow; None if not known.
    """

    kind: str
    tensors: int
    outputs: float
    lowest: float
    highest: float
    values: float | None

    @classmethod
    def of(cls, kind: str, tensors: Sequence[TensorReport]) -> "Gain":
        """Sum up tensors whose output_ratio is known."""
        outputs = [tensor.output_ratio for tensor in tensors if tensor.output_ratio is not None]
        values = [tensor.value_ratio for tensor in tensors if tensor.value_ratio is not None]
        middle = statistics.median(values) if values else None
        return cls(kind, len(tensors), statistics.median(outputs), min(outputs), max(outputs), middle)


def by_kind(tensors: Iterable[TensorReport]) -> dict[str, list[TensorReport]]:
    """Gather tensors of a kind, kinds in the order of the network."""
    members: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        members.setdefault(tensor.kind, []).append(tensor)
    return members


def to_json(report: Report) -> dict[str, Any]:
    """Tell everything for programs: facts, totals by group and in all, and each tensor."""
    return {
        "source": report.source,
        "destination": report.destination,
        "asked": list(report.asked),
        "seconds": report.seconds,
        "version": report.version,
        "groups": [asdict(total) for total in report.groups()],
        "total": asdict(report.total),
        "calibration": [asdict(gain) for gain in report.gains()],
        "tensors": [
            asdict(tensor) | {"kept": tensor.is_kept, "relative_error": tensor.relative_error}
            for tensor in report.tensors
        ],
    }


def lines(report: Report) -> list[str]:
    """Tell it in short for a terminal: formats, bytes and error by group, and the tensors that lost most."""
    rows: list[tuple[str, ...]] = [("group", "format", "", "", "bytes", "", "", "bits", "error")]
    for total in report.groups():
        rows.append((total.name, ", ".join(total.before), "->", ", ".join(total.after), *_figures(total)))
    rows.append(("in all", "", "", "", *_figures(report.total)))
    shown = aligned(rows, right=(4, 6, 7, 8))
    if worst := report.worst(_SHOWN):
        named = [(f"  {tensor.name}", tensor.after, write_error(tensor.relative_error)) for tensor in worst]
        shown += ["", "Largest errors:", *aligned(named, right=(2,))]
    if gains := report.gains():
        bought = [(f"  {gain.kind}", write_share(gain.outputs)) for gain in gains]
        shown += ["", "Error of outputs against rounding without calibration:", *aligned(bought, right=(1,))]
    return shown


def write_error(relative_error: float | None) -> str:
    """Write a relative error for people: "0.53 %", "exact" for zero, "kept" for None."""
    if relative_error is None:
        return "kept"
    return f"{write_number(100 * relative_error)} %" if relative_error else "exact"


def write_bits(bits: float | None) -> str:
    """Write bits for each weight for people; nothing if not known."""
    return "" if bits is None else f"{bits:.2f}"


def write_share(share: float) -> str:
    """Write a share as a change: 0.71 is "-29 %"."""
    return f"{100 * (share - 1):+.0f} %"


def write_number(value: float) -> str:
    """Write a number that is not negative with two or three digits: "123", "12.3", "0.12", "0.0010"."""
    if value < 0.1:
        return f"{value:#.2g}"
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _figures(total: Total) -> tuple[str, ...]:
    sizes = format_bytes(total.bytes_before), "->", format_bytes(total.bytes_after)
    return *sizes, write_bits(total.bits_after), write_error(total.relative_error)


def _ratio(error: float | None, plain: float | None) -> float | None:
    return math.sqrt(error / plain) if error is not None and plain else None
